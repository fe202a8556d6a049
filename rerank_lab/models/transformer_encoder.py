"""What the encoders that run a transformer share: their descriptions, rows of token vectors, and the hash of a checkpoint's files."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from rerank_lab.models.base import Detail, EncodedQuery, Tokens, Vectors
from rerank_lab.models.families import WEIGHTS

log = logging.getLogger(__name__)
READING = ("*config*.json", "tokenizer.json", "modules.json")
DECIDING = (*WEIGHTS, *READING)
CHAT = ("*.jinja", "chat_template.json")  # read by scorers alone
# The tokenizer of a folder without tokenizer.json.
TOKENIZER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json")


class TransformerEncoder:
    """The part of an encoder that does not depend on how vectors are made of hidden states.

    Attributes:
        name: what messages and results call it.
        config: of the transformer.
        tokenizer: without padding and truncation.
        runtime, precision: of the transformer.
        weights: hash of the transformer's weights.
    """

    name: str
    config: Any
    tokenizer: Tokenizer
    runtime: str
    precision: str
    weights: str

    @property
    def token_dimensions(self) -> int:
        """Columns of the token vectors."""
        raise NotImplementedError

    def about(self) -> dict[str, str]:
        """As Encoder.about."""
        return {"model": self.name, "arithmetic": self.arithmetic, "token_dimensions": str(self.token_dimensions), "weights": self.weights}

    @property
    def arithmetic(self) -> str:
        """The precision, and the runtime unless it is torch: each runtime rounds differently."""
        return self.precision if self.runtime == "torch" else f"{self.precision}, {self.runtime}"

    def encode(
        self,
        texts: Sequence[str],
        *,
        kind: str = "document",
        max_tokens: int = 512,
        detail: Detail = Detail.TOKENS,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Vectors:
        """Encodes N texts.

        Args:
            texts: any strings.
            kind: "document" or "query".
            max_tokens: tokens kept of each text, special ones not counted; the model's limit applies too.
            detail: how much is kept; STATES works only for bi-encoders of BERT's kind.
            progress: called after each batch with its number of texts.

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """
        return self.encode_tokens(self.tokenize(texts, kind, max_tokens), detail=detail, progress=progress)

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """As Encoder.tokenize."""
        raise NotImplementedError

    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, progress: Callable[[int], object] = lambda done: None) -> Vectors:
        """As Encoder.encode_tokens."""
        raise NotImplementedError

    def encode_queries(self, queries: Sequence[Tokens], *, detail: Detail = Detail.TOKENS) -> list[EncodedQuery]:
        """As Encoder.encode_queries, below Detail.STATES."""
        vectors = self.encode_tokens(queries, detail=detail)
        return [EncodedQuery(vectors.row(i), torch.from_numpy(~query.special)) for i, query in enumerate(queries)]

    def words(self, tokens: Tokens) -> list[str]:
        """As Encoder.words."""
        return [self.tokenizer.id_to_token(int(i)) or "" for i, special in zip(tokens.ids, tokens.special) if not special]


def row_offsets(texts: Sequence[Tokens], detail: Detail) -> Tensor:
    """Offsets of the token vectors of N texts (N + 1, int64); all 0 without token vectors."""
    kept = [len(t) - int(t.special.sum()) if detail else 0 for t in texts]
    return torch.from_numpy(np.concatenate([[0], np.cumsum(kept)]).astype(np.int64))


def own_rows(texts: Sequence[Tokens], batch: np.ndarray) -> Tensor:
    """Which tokens of a batch's texts have vectors: bool, one text after another."""
    return torch.from_numpy(~np.concatenate([texts[i].special for i in batch]))


def put_rows(into: Tensor, rows: Tensor, batch: np.ndarray, offsets: Tensor) -> None:
    """Copies the rows of a batch's texts, one text after another, to their places among all texts' rows."""
    start = 0
    for a, b in zip(offsets[batch].tolist(), offsets[batch + 1].tolist()):
        into[a:b] = rows[start : start + b - a]
        start += b - a


def warn(name: str, notes: Sequence[str]) -> None:
    """Logs what a person should know of the reading of a model's folder."""
    for note in notes:
        log.warning("model %r: %s", name, note)


def scorer_fingerprint(folder: Path, template: bool, instruction: str | None) -> str:
    """The hash of everything that a scorer's output depends on.

    Args:
        folder: the checkpoint.
        template: whether it reads pairs by its chat template.
        instruction: what is asked for in place of its own; None: nothing.
    """
    parts = [fingerprint(folder), *([fingerprint(folder, CHAT)] if template else []), *([] if instruction is None else [instruction])]
    return parts[0] if len(parts) == 1 else hashlib.sha256("\0".join(parts).encode()).hexdigest()


def fingerprint(folder: Path, names: Sequence[str] = DECIDING) -> str:
    """SHA-256 over the files that a checkpoint's output depends on: weights, configurations, tokenizer.

    Args:
        folder: the checkpoint.
        names: patterns of the files' names.
    """
    digest = hashlib.sha256()
    files = {Path(place) / name for place, _, found in os.walk(folder, followlinks=True) for name in found}
    if "tokenizer.json" in names and not any(path.name == "tokenizer.json" for path in files):
        names = (*names, *TOKENIZER_FILES)
    for path in sorted(path for path in files if any(fnmatch(path.name, name) for name in names)):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
