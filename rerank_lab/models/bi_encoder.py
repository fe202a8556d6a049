"""A bi-encoder in the layout of sentence-transformers. One forward makes pooled vectors and token vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rerank_kernels import exactly, pool_normalize, project_normalize
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.after import Normalize, after_pooling, check_width, width_after
from rerank_lab.models.base import AS_IT_IS, Detail, EncodedQuery, Origin, Overrides, Tokens, Vectors
from rerank_lab.models.checkpoint import Checkpoint, read_checkpoint
from rerank_lab.models.exported import choose, network
from rerank_lab.models.families import BI, T5_ENCODERS, weights_of
from rerank_lab.models.folder import Folder, read_json
from rerank_lab.models.forward import encoder_flops, encodings, fast_tokenizer, forward, limit_of, load_checkpoint, padding
from rerank_lab.models.pooling import pooled
from rerank_lab.models.prompts import check_room
from rerank_lab.models.registry import Placement, Source, pick_device
from rerank_lab.models.transformer_encoder import TransformerEncoder, fingerprint, own_rows, put_rows, row_offsets, warn

# Keys of config.json that say who wrote it, how it is stored or trained, and what heads put out.
COSMETIC = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "dtype", "finetuning_task", "gradient_checkpointing",
    "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


class BiEncoder(TransformerEncoder):
    """An encoder from a checkpoint folder in the layout of sentence-transformers (modules.json), or from a bare transformer (mean pooling).

    An empty text has no token vectors. Its pooled vector is that of the special tokens, or zeros if the model has none.

    If the folder has a head for token vectors (bge-m3's colbert_linear.pt), they are FlagEmbedding's: the head of the last hidden states
    of all tokens but the first, the last special one included, at unit length.

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
        warn(name, found.notes)
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
        check_width(name, overrides.truncate_dim, width_after(self.after, self.config.hidden_size))
        self.fingerprint, self.weights = fingerprint(folder), fingerprint(found.root, weights_of(found.root))
        self.head = _token_head(folder / found.token_head, name, self.config.hidden_size).to(self.device) if found.token_head else None
        if self.head is not None and subspace is not None:
            raise UserError(f"model {name!r} takes no subspace: it has a head of its own for token vectors ({found.token_head})")
        self.subspace = subspace if subspace is not None or self.head is not None else shipped_subspace(self.weights)
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

    @property
    def token_dimensions(self) -> int:
        """Columns of the token vectors: r, or d without a subspace or head."""
        if self.head is not None:
            return self.head.out_features
        return int(self.config.hidden_size if self.subspace is None else self.subspace.shape[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """As Encoder.notes."""
        return self.checkpoint.notes

    def reading(self) -> str:
        """As Encoder.reading."""
        return self.checkpoint.reading()

    def key(self) -> str:
        """As Encoder.key: 24 hexadecimal digits."""
        head = self.checkpoint.token_head
        parts = [self.fingerprint, subspace_hash(self.subspace), self.arithmetic, self.device.type, *self.checkpoint.newly_read]
        parts += ["truncated from the left"] * (self.truncation_side == "left") + ["no tokens, no vector"] * (not self.specials)
        parts += ["no padding"] * self.network.equal_lengths
        parts += [head, fingerprint(self.folder, (head,))] if head else []
        parts += [f"{name} asked for: {value!r}" for name in ("document_prompt", "truncate_dim") if (value := getattr(self.overrides, name)) is not None]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def origin(self) -> Origin:
        """As Encoder.origin."""
        return origin_of(self.folder, self.checkpoint, self.weights, self.subspace)

    def prompt(self, kind: str) -> str:
        """What the model puts before a text of a kind, "query" or "document"."""
        return self.checkpoint.query_prompt if kind == "query" else self.checkpoint.document_prompt

    @exactly(tensors=True)
    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, progress: Callable[[int], object] = lambda done: None) -> Vectors:
        """`encode` for texts that are tokenised already."""
        offsets = row_offsets(texts, detail)
        nnz, width = int(offsets[-1]), 2 * self.config.hidden_size * len(self.state_layers)
        pooled = torch.zeros(len(texts), self.dimensions, dtype=torch.float32, device="cpu")
        packed = {"tokens": torch.zeros(nnz, self.token_dimensions, dtype=self.token_dtype, device="cpu")}
        packed["states"] = torch.zeros(nnz if detail >= Detail.STATES else 0, width, dtype=torch.float16, device="cpu")
        wanted = self.state_layers if detail >= Detail.STATES else range(0)
        for batch, ends, states in forward(self.network, texts, self.device, keys_values=wanted):
            pooled[torch.from_numpy(batch)] = self._pool(states.last, ends, [texts[i].unpooled for i in batch]).float().cpu()
            if detail:
                own = own_rows(texts, batch).to(self.device)
                rows = {"tokens": self._token_vectors(states.last[own]).cpu()}
                if states.keys_values is not None:
                    rows["states"] = states.keys_values[own].half().cpu()
                for name, part in rows.items():
                    put_rows(packed[name], part, batch, offsets)
            progress(len(batch))
        if not bool(pooled.isfinite().all() and packed["tokens"].isfinite().all() and packed["states"].isfinite().all()):
            raise ModelError(f"model {self.name!r} gave a NaN or infinite vector")
        return Vectors(pooled, torch.tensor([t.full_length for t in texts], dtype=torch.int64, device="cpu"), offsets, **packed)

    @exactly(tensors=True)
    def encode_queries(self, queries: Sequence[Tokens], *, detail: Detail = Detail.TOKENS) -> list[EncodedQuery]:
        """As Encoder.encode_queries."""
        if detail < Detail.STATES:
            return super().encode_queries(queries, detail=detail)
        found: dict[int, EncodedQuery] = {}
        nothing = torch.zeros(0, 0, dtype=torch.float16, device=self.device)
        for batch, ends, states in forward(self.network, queries, self.device, keep=self.state_layers.start):
            for i, a, b in zip(batch.tolist(), ends[:-1].tolist(), ends[1:].tolist()):
                start, last = states.kept[self.state_layers.start][a:b], states.last[a:b]
                own = torch.from_numpy(~queries[i].special).to(self.device)
                tokens = self._token_vectors(last[own])
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
        by = self.subspace if self.head is None else self.head.weight
        project = 2 * int(lengths.sum()) * by.numel() if detail and by is not None else 0
        return encoder_flops(self.config, lengths + self.specials) + project

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """As Encoder.tokenize; the model's limit applies too."""
        prompt, limit, found = self.prompt(kind), min(max_tokens, self.limit), []
        check_room(self.name, self.tokenizer, prompt, kind, limit)
        unpooled = 0 if self.checkpoint.prompt_pooled or not prompt else self._prompt_length(prompt, limit)
        for encoding in encodings(self.tokenizer, [prompt + text for text in texts]):
            wanted = len(encoding)
            encoding.truncate(limit, direction=self.truncation_side)
            found.append(Tokens.of(self.tokenizer.post_process(encoding), wanted, unpooled))
        if self.head is not None:
            for tokens in found:
                tokens.special[:] = False
                tokens.special[:1] = True
        return found

    @property
    def token_dtype(self) -> torch.dtype:
        """Of token vectors: fp16, or fp32 if a head was trained to make them."""
        return torch.float16 if self.head is None else torch.float32

    def _token_vectors(self, h: Tensor) -> Tensor:
        """Hidden states of the tokens that have vectors (nnz × d) → their vectors (nnz × r)."""
        return project_normalize(h if self.head is None else self.head(h.float()), self.subspace, self.token_dtype)

    def _prompt_length(self, prompt: str, limit: int) -> int:
        """Tokens of a prompt alone, special ones before it counted and one behind it not: sentence-transformers pools what follows so many."""
        encoding = next(encodings(self.tokenizer, [prompt]))
        encoding.truncate(limit, direction=self.truncation_side)
        ids = self.tokenizer.post_process(encoding).ids
        return len(ids) - (bool(ids) and ids[-1] in self.special_ids)

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


def _class_of(found: Checkpoint) -> Any:
    """The class of transformers that a checkpoint's transformer is loaded as."""
    import transformers

    architecture = Folder(found.root, found.name).architecture
    return getattr(transformers, architecture) if architecture in T5_ENCODERS else transformers.AutoModel


def shipped_subspace(model_fingerprint: str) -> Tensor | None:
    """The projection V (d × r) that the package ships for a model with this fingerprint; None: it ships none."""
    from safetensors import safe_open

    for path in sorted((Path(__file__).parent.parent / "data" / "subspaces").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("model") == model_fingerprint:
                V: Tensor = file.get_tensor("V")
                return V
    return None


def subspace_hash(subspace: Tensor | None) -> str:
    """SHA-256 of a projection's numbers; None: of nothing."""
    return hashlib.sha256(b"" if subspace is None else subspace.cpu().numpy().tobytes()).hexdigest()


def origin_of(folder: Path, found: Checkpoint, weights: str, subspace: Tensor | None) -> Origin:
    """What decides the token vectors of a checkpoint with these weights (their hash) and this projection."""
    by = fingerprint(folder, (found.token_head,)) if found.token_head else "" if subspace is None else subspace_hash(subspace)
    return Origin(weights, _reading(found), by, found.query_prompt, found.document_prompt)


def _reading(found: Checkpoint) -> str:
    """Hash of the transformer's config.json, and of how texts are cut. Keys that say nothing of token vectors do not count."""
    cut = read_json(found.root / "tokenizer_config.json")
    limit = found.max_seq_length or cut.get("model_max_length")
    value = [_deciding(read_json(found.root / "config.json")), limit, cut.get("truncation_side", "right"), found.lower]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _deciding(value: object) -> object:
    """A part of config.json without COSMETIC keys."""
    return {key: _deciding(one) for key, one in value.items() if key not in COSMETIC} if isinstance(value, dict) else value


def origin(source: Source, asked: Overrides, subspace: str | None) -> Origin:
    """Encoder.origin of the bi-encoder that `load` would make. Its weights are hashed, not loaded. Arguments and errors as for `load`."""
    found = read_checkpoint(source.folder, BI).overridden(asked)
    weights = fingerprint(found.root, weights_of(found.root))
    return origin_of(source.folder.path, found, weights, shipped_subspace(weights) if subspace is None else _read_subspace(subspace))


def _token_head(path: Path, name: str, width: int) -> nn.Linear:
    """The linear map in a file that torch wrote, as FlagEmbedding keeps it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        head = nn.Linear(width, len(state["weight"]), bias="bias" in state, device="cpu", dtype=torch.float32)
        head.load_state_dict(state)
    except Exception as error:  # torch and pickle raise errors of their own
        raise UserError(f"model {name!r}: {path} is no linear map of {width} components: {' '.join(str(error).split()):.200}; copy it again") from error
    return head.eval()


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
