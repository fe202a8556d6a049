"""Static embeddings: a row for each token of the vocabulary, and a text's vector is their mean. No transformer runs.

Reads StaticEmbedding of sentence-transformers and the folders of model2vec, whose rows may be shared by several tokens
(mapping) and weighted (weights). sentence-transformers is the reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import embedding_bag

from rerank_kernels import exactly, project_normalize
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.after import after_pooling, check_width, width_after
from rerank_lab.models.base import AS_IT_IS, Detail, EncodedQuery, Origin, Overrides, Tokens, Vectors
from rerank_lab.models.checkpoint import AFTER, KNOWN_MODULE, Checkpoint, read_pooled, refuse_leftovers
from rerank_lab.models.families import STATIC, family, refuse_parts, wrong_role
from rerank_lab.models.folder import Folder, last_part
from rerank_lab.models.forward import LONGEST, encodings
from rerank_lab.models.prompts import check_room
from rerank_lab.models.registry import Placement, Source, pick_device
from rerank_lab.models.transformer_encoder import READING, fingerprint, warn

TOKENS_AT_ONCE = 1 << 16  # whose rows are held beside the table
MODEL2VEC = "a folder of model2vec without modules.json is read as the one that model2vec writes: the mean of all tokens' rows"


def read_static(folder: Folder) -> Checkpoint:
    """Reads a folder's JSON files and decides how the model is scored. No weight is loaded.

    Raises:
        UserError: the model is of another family, or the folder has something that is not supported.
    """
    path, name, types = folder.path, folder.name, folder.types
    found, sign = family(folder)
    if found != STATIC:
        raise wrong_role(name, found, sign, STATIC)
    refuse_parts((path, folder.root), name)
    if types and not _ordered(types):
        raise UserError(
            f"{path / 'modules.json'}: after a StaticEmbedding only {', '.join(AFTER)} of sentence-transformers are known, not {', '.join(types)}; "
            "name a model of these"
        )
    read = Checkpoint(name, path, folder.root, STATIC)
    if types:
        return read_pooled(read, folder, 1)
    refuse_leftovers(folder)
    unit = bool(folder.config.get("normalize"))
    return replace(read, after=(("Normalize", path),) if unit else (), said=(f"{MODEL2VEC}{', at unit length' if unit else ''}",))


def _ordered(types: Sequence[str]) -> bool:
    """Whether these modules are one StaticEmbedding of sentence-transformers and what may follow the pooling."""
    first, *rest = types
    return first.startswith("sentence_transformers.") and last_part(first) == "StaticEmbedding" and all(
        KNOWN_MODULE.fullmatch(kind) and last_part(kind) in AFTER for kind in rest
    )  # fmt: skip


class StaticEncoder:
    """An encoder of static embeddings.

    A pooled vector is the mean of a text's rows, then what the folder's modules make of it; of a text without tokens, what
    they make of zeros. Token vectors are the rows at unit length.

    Args:
        folder: the checkpoint.
        name: what messages and results call it.
        device: torch device.
        overrides: prompts and dimensions other than the folder's.

    Raises:
        UserError: the folder is not understood, or its table and its tokenizer do not fit.
    """

    pools, specials, runtime, precision = True, 0, "torch", "fp32"

    def __init__(self, folder: Path, name: str, *, device: torch.device | str = "cpu", overrides: Overrides = AS_IT_IS):
        self.name, self.folder, self.device, self.overrides = name, folder, torch.device(device), overrides
        own = read_static(Folder(folder, name))
        self.checkpoint = found = own.overridden(overrides)
        self.asked_query_prompt = found.query_prompt if found.query_prompt != own.query_prompt else None
        warn(name, found.notes)
        self.tokenizer = read_tokenizer(found)
        cut = self.tokenizer.truncation or {}
        self.limit, self.truncation_side = int(cut.get("max_length", LONGEST)), str(cut.get("direction", "right")).lower()
        self.tokenizer.no_truncation()
        self.table = _table(found).to(self.device)
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= len(self.table):
            raise UserError(
                f"model {name!r}: {found.root} has {len(self.table)} rows, and its tokenizer makes the token number {highest}; copy the whole model"
            )
        self.after = after_pooling(found.after, name).to(self.device)
        check_width(name, overrides.truncate_dim, width_after(self.after, self.table.shape[1]))
        self.fingerprint = fingerprint(folder)

    @cached_property
    def dimensions(self) -> int:
        """Columns of the pooled vectors."""
        made, kept = width_after(self.after, self.table.shape[1]), self.checkpoint.truncate_dim
        return made if kept is None else min(made, kept)

    @property
    def token_dimensions(self) -> int:
        """Columns of the token vectors."""
        return int(self.table.shape[1])

    @property
    def similarity(self) -> str:
        """How the model compares pooled vectors: "cosine" or "dot"."""
        return self.checkpoint.similarity

    @property
    def notes(self) -> tuple[str, ...]:
        """As Encoder.notes."""
        return self.checkpoint.notes

    def reading(self) -> str:
        """As Encoder.reading."""
        return self.checkpoint.reading()

    def key(self) -> str:
        """As Encoder.key: 24 hexadecimal digits."""
        asked = [f"{name}: {value!r}" for name in ("document_prompt", "truncate_dim") if (value := getattr(self.overrides, name)) is not None]
        return hashlib.sha256("\0".join(["static", self.fingerprint, self.device.type, *asked]).encode()).hexdigest()[:24]

    def about(self) -> dict[str, str]:
        """As Encoder.about."""
        return {"model": self.name, "arithmetic": self.precision, "token_dimensions": str(self.token_dimensions), "weights": self.fingerprint}

    def origin(self) -> Origin:
        """As Encoder.origin."""
        return origin_of(self.checkpoint, self.fingerprint)

    def prompt(self, kind: str) -> str:
        """As Encoder.prompt."""
        return self.checkpoint.query_prompt if kind == "query" else self.checkpoint.document_prompt

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """As Encoder.tokenize."""
        prompt, limit, found = self.prompt(kind), min(max_tokens, self.limit), []
        check_room(self.name, self.tokenizer, prompt, kind, limit)
        for encoding in encodings(self.tokenizer, [prompt + text for text in texts]):
            wanted = len(encoding)
            encoding.truncate(limit, direction=self.truncation_side)
            found.append(Tokens.of(encoding, wanted))
        return found

    @exactly(tensors=True)
    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, progress: Callable[[int], object] = lambda done: None) -> Vectors:
        """As Encoder.encode_tokens."""
        pooled = torch.zeros(len(texts), self.dimensions, dtype=torch.float32, device="cpu")
        rows: list[Tensor] = [torch.zeros(0, self.token_dimensions, dtype=torch.float16, device="cpu")]
        for start, end in _parts([len(text) for text in texts]):
            part = texts[start:end]
            ids = torch.from_numpy(np.concatenate([text.ids for text in part]).astype(np.int64)).to(self.device)
            ends = torch.tensor([0, *(len(text) for text in part)], dtype=torch.int64, device=self.device).cumsum(0)
            with torch.inference_mode():
                made = self.after(embedding_bag(ids, self.table, ends[:-1], mode="mean"))
                pooled[start:end] = made[:, : self.checkpoint.truncate_dim].cpu()
                if detail:
                    rows.append(project_normalize(self.table[ids], None, torch.float16).cpu())
            progress(len(part))
        tokens = torch.cat(rows)
        if not bool(pooled.isfinite().all() and tokens.isfinite().all()):
            raise ModelError(f"model {self.name!r} gave a NaN or infinite vector")
        offsets = torch.tensor([0, *(len(text) if detail else 0 for text in texts)], dtype=torch.int64, device="cpu").cumsum(0)
        lengths = torch.tensor([text.full_length for text in texts], dtype=torch.int64, device="cpu")
        return Vectors(pooled, lengths, offsets, tokens, torch.zeros(0, 0, dtype=torch.float16, device="cpu"))

    def encode_queries(self, queries: Sequence[Tokens], *, detail: Detail = Detail.TOKENS) -> list[EncodedQuery]:
        """As Encoder.encode_queries."""
        vectors = self.encode_tokens(queries, detail=detail)
        return [EncodedQuery(vectors.row(i), torch.from_numpy(~query.special)) for i, query in enumerate(queries)]

    def words(self, tokens: Tokens) -> list[str]:
        """As Encoder.words."""
        return [self.tokenizer.id_to_token(int(i)) or "" for i in tokens.ids]

    def flops(self, lengths: Tensor, detail: Detail) -> int:
        """0: rows are looked up and added, and no matrix is multiplied by another."""
        return 0


def _parts(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of texts with TOKENS_AT_ONCE tokens together, more only for a single text."""
    start, size = 0, 0
    for i, length in enumerate(lengths):
        if i > start and size + length > TOKENS_AT_ONCE:
            yield start, i
            start, size = i, 0
        size += length
    if start < len(lengths):
        yield start, len(lengths)


def read_tokenizer(found: Checkpoint) -> Tokenizer:
    """The tokenizer beside the table, without padding.

    Raises:
        UserError: its file is missing or damaged.
    """
    file = found.root / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"model {found.name!r}: {file} does not load: {str(error).partition(chr(10))[0]}; copy the whole model") from error
    tokenizer.no_padding()
    return tokenizer


def _table(found: Checkpoint) -> Tensor:
    """A row for each token number, fp32: embedding.weight, or embeddings[mapping] · weights of model2vec."""
    file = next((path for path in (found.root / "model.safetensors", found.root / "pytorch_model.bin") if path.is_file()), None)
    if file is None:
        raise UserError(f"model {found.name!r}: {found.root} has no weights (model.safetensors); copy the whole model")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
        table = (state.pop("embedding.weight") if "embedding.weight" in state else state.pop("embeddings")).float()
        if (mapping := state.pop("mapping", None)) is not None:
            table = table[mapping.long()]
        if (weights := state.pop("weights", None)) is not None:
            table = table * weights.float()[:, None]
        if table.ndim != 2:
            raise ValueError(f"a table of shape {tuple(table.shape)}")
    except Exception as error:  # torch, pickle and safetensors raise errors of their own
        raise UserError(
            f"model {found.name!r}: {file} holds no table of static embeddings: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        ) from error
    if state:
        raise UserError(f"model {found.name!r}: nothing takes the weights {', '.join(sorted(state)[:3])} in {file}")
    return table.contiguous()


def origin_of(found: Checkpoint, weights: str) -> Origin:
    """What decides the token vectors of a checkpoint whose files have this hash."""
    return Origin(weights, fingerprint(found.folder, READING), "", found.query_prompt, found.document_prompt)


def load(source: Source, placement: Placement, subspace: str | None = None) -> StaticEncoder:
    """Loads static embeddings.

    Args:
        source: name and folder.
        placement: where it runs, and what is asked for.
        subspace: must be None.

    Raises:
        UserError: the folder is not understood, or a runtime, a precision or a subspace is asked for.
    """
    if placement.runtime not in ("auto", "torch") or placement.precision != "fp32":
        asked = f"runtime {placement.runtime} in {placement.precision}"
        raise UserError(f"model {source.name!r} is a static embedding model: it adds up rows of a table and has no transformer for {asked}; leave that out")
    if subspace is not None:
        raise UserError(f"model {source.name!r} is a static embedding model, whose token vectors are rows of its table; leave out the subspace {subspace}")
    return StaticEncoder(source.folder.path, source.name, device=pick_device(placement.device), overrides=placement.overrides)


def origin(source: Source, asked: Overrides, subspace: str | None = None) -> Origin:
    """Encoder.origin of the model that `load` would make, without loading it. It takes no subspace."""
    found = read_static(source.folder).overridden(asked)
    return origin_of(found, fingerprint(source.folder.path))
