"""A bi-encoder in the layout of sentence-transformers. One forward makes pooled vectors and token vectors."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rerank_kernels import exactly, pool_normalize, project_normalize
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.after import Normalize, after_pooling, width_after
from rerank_lab.models.base import AS_IT_IS, Detail, EncodedQuery, Overrides, Tokens, Vectors
from rerank_lab.models.checkpoint import Checkpoint, read_checkpoint
from rerank_lab.models.exported import choose, network
from rerank_lab.models.families import BI, T5_ENCODERS, WEIGHTS, weights_of
from rerank_lab.models.folder import Folder
from rerank_lab.models.forward import encoder_flops, encodings, fast_tokenizer, forward, limit_of, load_checkpoint, padding
from rerank_lab.models.registry import Placement, Source, pick_device

log = logging.getLogger(__name__)


class BiEncoder:
    """An encoder from a checkpoint folder in the layout of sentence-transformers (modules.json), or from a bare transformer (mean pooling).

    Args:
        folder: the checkpoint.
        name: what messages and results call it.
        subspace: d × r orthonormal projection of token vectors; None: the one shipped for exactly these weights, or none.
        device: torch device.
        runtime, precision: as models.exported.choose takes them. They do not change pooling and the types of the vectors.
        overrides: prompts and dimensions other than the folder's.

    Raises:
        UserError: there is no such checkpoint, the runtime is not available, or the checkpoint has an unknown module.
    """

    pools = True

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        subspace: Tensor | None = None,
        device: torch.device | str = "cpu",
        runtime: str = "auto",
        precision: str = "fp32",
        overrides: Overrides = AS_IT_IS,
    ):
        self.name, self.folder, self.device, self.overrides = name, folder, torch.device(device), overrides
        own = read_checkpoint(Folder(folder, name), BI)
        self.checkpoint = found = own.overridden(overrides)
        self.asked_query_prompt = found.query_prompt if found.query_prompt != own.query_prompt else None
        warn(found)
        model, tokenizer = load_checkpoint(_class_of(found), found.root, name, spare="pooler")
        self.model: nn.Module = model.to(self.device)
        self.config: Any = model.config
        self.specials: int = tokenizer.num_special_tokens_to_add(False)
        self.limit: int = limit_of(found, model, tokenizer, self.specials) - self.specials
        self.runtime, self.precision = choose(runtime, precision), precision
        self.network = network(model, runtime=self.runtime, precision=precision, **padding(model, tokenizer)._asdict())
        self.tokenizer, self.truncation_side = fast_tokenizer(tokenizer, lower=found.lower), str(tokenizer.truncation_side)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.after = after_pooling(found.after, name).to(self.device)
        self.fingerprint, self.weights = fingerprint(folder), fingerprint(found.root, weights_of(found.root))
        self.subspace = subspace if subspace is not None else shipped_subspace(self.weights)
        if self.subspace is not None:
            if self.subspace.ndim != 2 or self.subspace.shape[0] != self.config.hidden_size:
                raise UserError(f"subspace of shape {tuple(self.subspace.shape)} does not fit {name!r}: it needs {self.config.hidden_size} rows")
            self.subspace = self.subspace.to(self.device)

    @cached_property
    def dimensions(self) -> int:
        """Columns of the pooled vectors."""
        made, kept = width_after(self.after, self.config.hidden_size), self.checkpoint.truncate_dim
        return made if kept is None else min(made, kept)

    @property
    def similarity(self) -> str:
        """How the model compares pooled vectors: "cosine" or "dot"."""
        return self.checkpoint.similarity

    @cached_property
    def token_dimensions(self) -> int:
        """Columns of the token vectors: r, or d without a subspace."""
        return int(self.config.hidden_size if self.subspace is None else self.subspace.shape[1])

    def reading(self) -> str:
        """As Encoder.reading."""
        return self.checkpoint.reading()

    def key(self) -> str:
        """As Encoder.key: 24 hexadecimal digits."""
        subspace = b"" if self.subspace is None else self.subspace.cpu().numpy().tobytes()
        parts = [self.fingerprint, hashlib.sha256(subspace).hexdigest(), self.arithmetic, self.device.type, *self.checkpoint.newly_read]
        parts += ["truncated from the left"] * (self.truncation_side == "left") + ["no tokens, no vector"] * (not self.specials)
        parts += ["no padding"] * self.network.equal_lengths
        parts += [f"{name} asked for: {value!r}" for name in ("document_prompt", "truncate_dim") if (value := getattr(self.overrides, name)) is not None]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def about(self) -> dict[str, str]:
        """As Encoder.about."""
        return {"model": self.name, "arithmetic": self.arithmetic, "token_dimensions": str(self.token_dimensions), "weights": self.weights}

    @property
    def arithmetic(self) -> str:
        """The precision, and the runtime unless it is torch: each runtime rounds differently."""
        return self.precision if self.runtime == "torch" else f"{self.precision}, {self.runtime}"

    def prompt(self, kind: str) -> str:
        """What the model puts before a text of a kind, "query" or "document"."""
        return self.checkpoint.query_prompt if kind == "query" else self.checkpoint.document_prompt

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

        An empty text has no token vectors. Its pooled vector is that of the special tokens, or zeros if the model has none.

        Args:
            texts: any strings.
            kind: "document" or "query", which chooses the model's prompt.
            max_tokens: tokens kept of each text, special ones not counted; the model's limit applies too.
            detail: how much is kept; STATES works only for models of BERT's kind.
            progress: called after each batch with its number of texts.

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """
        return self.encode_tokens(self.tokenize(texts, kind, max_tokens), detail=detail, progress=progress)

    @exactly(tensors=True)
    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, progress: Callable[[int], object] = lambda done: None) -> Vectors:
        """`encode` for texts that are tokenised already."""
        kept = [len(t) - int(t.special.sum()) if detail else 0 for t in texts]
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(kept)]).astype(np.int64))
        nnz, width = int(offsets[-1]), 2 * self.config.hidden_size * len(self.state_layers)
        pooled = torch.zeros(len(texts), self.dimensions, dtype=torch.float32, device="cpu")
        packed = {"tokens": torch.zeros(nnz, self.token_dimensions, dtype=torch.float16, device="cpu")}
        packed["states"] = torch.zeros(nnz if detail >= Detail.STATES else 0, width, dtype=torch.float16, device="cpu")
        wanted = self.state_layers if detail >= Detail.STATES else range(0)
        for batch, ends, states in forward(self.network, texts, self.device, keys_values=wanted):
            pooled[torch.from_numpy(batch)] = self._pool(states.last, ends, [texts[i].unpooled for i in batch]).float().cpu()
            if detail:
                own = torch.from_numpy(~np.concatenate([texts[i].special for i in batch])).to(self.device)
                rows = {"tokens": project_normalize(states.last[own], self.subspace, torch.float16).cpu()}
                if states.keys_values is not None:
                    rows["states"] = states.keys_values[own].half().cpu()
                start = 0
                for i in batch:
                    for name, part in rows.items():
                        packed[name][offsets[i] : offsets[i + 1]] = part[start : start + kept[i]]
                    start += kept[i]
            progress(len(batch))
        if not bool(pooled.isfinite().all() and packed["tokens"].isfinite().all() and packed["states"].isfinite().all()):
            raise ModelError(f"model {self.name!r} gave a NaN or infinite vector")
        return Vectors(pooled, torch.tensor([t.full_length for t in texts], dtype=torch.int64, device="cpu"), offsets, **packed)

    @exactly(tensors=True)
    def encode_queries(self, queries: Sequence[Tokens], *, detail: Detail = Detail.TOKENS) -> list[EncodedQuery]:
        """As Encoder.encode_queries."""
        if detail < Detail.STATES:
            vectors = self.encode_tokens(queries, detail=detail)
            return [EncodedQuery(vectors.row(i), torch.from_numpy(~query.special)) for i, query in enumerate(queries)]
        found: dict[int, EncodedQuery] = {}
        nothing = torch.zeros(0, 0, dtype=torch.float16, device=self.device)
        for batch, ends, states in forward(self.network, queries, self.device, keep=self.state_layers.start):
            for i, a, b in zip(batch.tolist(), ends[:-1].tolist(), ends[1:].tolist()):
                start, last = states.kept[self.state_layers.start][a:b], states.last[a:b]
                own = torch.from_numpy(~queries[i].special).to(self.device)
                tokens = project_normalize(last[own], self.subspace, torch.float16)
                pooled = self._pool(last, torch.tensor([0, b - a], dtype=torch.int64, device=self.device), [queries[i].unpooled]).float()
                offsets = torch.tensor([0, len(tokens)], dtype=torch.int64, device=self.device)
                found[i] = EncodedQuery(
                    Vectors(pooled, torch.tensor([queries[i].full_length], dtype=torch.int64, device="cpu"), offsets, tokens, nothing),
                    own,
                    start[None],
                    last[None],
                )
        return [found[i] for i in range(len(queries))]

    @cached_property
    def state_layers(self) -> range:
        """The layers whose keys and values are kept at Detail.STATES: the upper half."""
        return range(self.config.num_hidden_layers // 2, self.config.num_hidden_layers)

    def flops(self, lengths: Tensor, detail: Detail) -> int:
        """As Encoder.flops. Above Detail.POOLED the projection of token vectors is included."""
        lengths = lengths.clamp(max=self.limit)
        project = 2 * int(lengths.sum()) * self.subspace.numel() if detail and self.subspace is not None else 0
        return encoder_flops(self.config, lengths + self.specials) + project

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """As Encoder.tokenize; the model's limit applies too."""
        prompt, limit, found = self.prompt(kind), min(max_tokens, self.limit), []
        unpooled = 0 if self.checkpoint.prompt_pooled or not prompt else self._prompt_length(prompt, limit)
        for encoding in encodings(self.tokenizer, [prompt + text for text in texts]):
            wanted = len(encoding)
            encoding.truncate(limit, direction=self.truncation_side)
            found.append(Tokens.of(self.tokenizer.post_process(encoding), wanted, unpooled))
        return found

    def _prompt_length(self, prompt: str, limit: int) -> int:
        """Tokens of a prompt alone, special ones before it counted and one behind it not: sentence-transformers pools what follows so many."""
        encoding = next(encodings(self.tokenizer, [prompt]))
        encoding.truncate(limit, direction=self.truncation_side)
        ids = self.tokenizer.post_process(encoding).ids
        return len(ids) - (bool(ids) and ids[-1] in self.special_ids)

    def words(self, tokens: Tokens) -> list[str]:
        """As Encoder.words."""
        return [self.tokenizer.id_to_token(int(i)) or "" for i, special in zip(tokens.ids, tokens.special) if not special]

    def _pool(self, h: Tensor, offsets: Tensor, unpooled: Sequence[int]) -> Tensor:
        """Pooled vectors of B texts, of their tokens' states h. The first tokens, `unpooled` of each text, are left out."""
        kept, pooling = self.checkpoint.truncate_dim, self.checkpoint.pooling
        left_out = torch.tensor(unpooled, dtype=torch.int64, device=h.device)
        if pooling == "mean" and [type(module) for module in self.after] == [Normalize] and not any(unpooled):
            return pool_normalize(h, offsets)[:, :kept]
        starts, ends = torch.minimum(offsets[:-1] + left_out, offsets[1:]), offsets[1:]
        full = ends > starts  # a text without tokens has nothing to pool
        vector = torch.zeros(len(full), h.shape[1], dtype=h.dtype, device=h.device)
        match pooling:
            case "cls":
                vector[full] = h[starts[full]]
            case "lasttoken":
                vector[full] = h[ends[full] - 1]
            case _:
                for i, first in zip(full.nonzero()[:, 0].tolist(), left_out[full].tolist()):
                    vector[i] = pooled(pooling, h[int(starts[i]) : int(ends[i])], first)
        made: Tensor = self.after(vector)
        return torch.where(full[:, None], made, 0.0)[:, :kept]


def pooled(pooling: str, h: Tensor, before: int) -> Tensor:
    """One vector (d) of a text's states h (L × d, L ≥ 1).

    Args:
        pooling: "max", "mean", "mean_sqrt_len" (the sum over √L) or "weightedmean" (a token weighs as much as its place, counted from 1).
        h: the states.
        before: tokens before the first of these, which move its place.
    """
    match pooling:
        case "max":
            return h.amax(0)
        case "mean_sqrt_len":
            return h.sum(0) / math.sqrt(len(h))
        case "weightedmean":
            weights = torch.arange(before + 1, before + 1 + len(h), dtype=h.dtype, device=h.device)
            return (h * weights[:, None]).sum(0) / weights.sum()
    return h.mean(0)


def _class_of(found: Checkpoint) -> Any:
    """The class of transformers that a checkpoint's transformer is loaded as."""
    import transformers

    architecture = Folder(found.root, found.name).architecture
    return getattr(transformers, architecture) if architecture in T5_ENCODERS else transformers.AutoModel


def warn(found: Checkpoint) -> None:
    """Logs what a person should know of a checkpoint's reading."""
    for note in found.notes:
        log.warning("model %r: %s", found.name, note)


DECIDING = (*WEIGHTS, "*config*.json", "tokenizer.json", "modules.json")
# The tokenizer of a folder without tokenizer.json.
TOKENIZER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json")


def fingerprint(folder: Path, names: Sequence[str] = DECIDING) -> str:
    """SHA-256 over the files that a checkpoint's output depends on: weights, configurations, tokenizer.

    Args:
        folder: the checkpoint.
        names: patterns of the files' names.
    """
    digest = hashlib.sha256()
    files = {Path(place) / name for place, _, found in os.walk(folder, followlinks=True) for name in found}
    if names is DECIDING and not any(path.name == "tokenizer.json" for path in files):
        names = (*DECIDING, *TOKENIZER_FILES)
    for path in sorted(path for path in files if any(fnmatch(path.name, name) for name in names)):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def shipped_subspace(model_fingerprint: str) -> Tensor | None:
    """The projection V (d × r) that the package ships for a model with this fingerprint; None: it ships none."""
    from safetensors import safe_open

    for path in sorted((Path(__file__).parent.parent / "data" / "subspaces").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("model") == model_fingerprint:
                V: Tensor = file.get_tensor("V")
                return V
    return None


def load(source: Source, placement: Placement, subspace: str | None = None) -> BiEncoder:
    """Loads a bi-encoder.

    Args:
        source: its name and folder.
        placement: where and how it runs.
        subspace: a safetensors file with the projection V; None: the shipped one, or none.

    Raises:
        UserError: the model is not found, has another role, or the file holds no projection that fits.
    """
    V, device = _read_subspace(subspace), pick_device(placement.device)
    return BiEncoder(
        source.folder.path, source.name, subspace=V, device=device, runtime=placement.runtime, precision=placement.precision, overrides=placement.overrides
    )


def _read_subspace(path: str | None) -> Tensor | None:
    if path is None:
        return None
    from safetensors.torch import load_file

    try:
        V = load_file(path)["V"].float()
        fits = V.ndim == 2 and 1 <= V.shape[1] <= V.shape[0] and torch.allclose(V.T @ V, torch.eye(V.shape[1], dtype=torch.float32, device="cpu"), atol=1e-2)
    except Exception as error:
        raise UserError(f"{path}: no safetensors file with a tensor V (experiments/training/fit_subspace.py writes one)") from error
    if not fits:
        raise UserError(f"{path}: V of shape {tuple(V.shape)} has no orthonormal columns (experiments/training/fit_subspace.py writes one that has)")
    return V
