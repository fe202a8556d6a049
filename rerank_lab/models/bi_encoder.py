"""A sentence-transformers-style bi-encoder that gives pooled vectors and packed token vectors in one forward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from rerank_kernels import pool_normalize, project_normalize
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.forward import Tokens, encoder_flops, encodings, forward, load_checkpoint, places
from rerank_lab.models.runtimes import choose, network

POOLINGS = ("mean", "cls", "max", "lasttoken")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


class Detail(IntEnum):
    """How much of a text is kept; each level holds what those before it hold."""

    POOLED = 0
    TOKENS = 1  # and token vectors
    STATES = 2  # and the keys and values of the upper half of the layers, which a one-way cross-encoder reads


@dataclass(frozen=True)
class Vectors:
    """N encoded texts. What was not asked for has no rows.

    Attributes:
        pooled: N × d, fp32, as the model's own modules pool and normalise.
        lengths: N, int64, tokens before truncation, special ones not counted.
        offsets: N + 1, int64, into tokens and states; all 0 where neither was asked for.
        tokens: nnz × r, fp16, unit vectors on the model's subspace, special tokens left out.
        states: nnz × 2·d·S, fp16, keys and values of each of the upper S layers in turn, of the same tokens.
    """

    pooled: Tensor
    lengths: Tensor
    offsets: Tensor
    tokens: Tensor
    states: Tensor

    def to(self, device: torch.device) -> Vectors:
        """The same on another device."""
        return Vectors(*(getattr(self, field.name).to(device) for field in fields(self)))

    def row(self, i: int) -> Vectors:
        """Text i alone; views."""
        a, b = int(self.offsets[i]), int(self.offsets[i + 1])
        states = self.states[a:b] if len(self.states) else self.states
        return Vectors(self.pooled[i : i + 1], self.lengths[i : i + 1], self.offsets[i : i + 2] - a, self.tokens[a:b], states)


@dataclass(frozen=True)
class Read:
    """A query of Lq tokens, special ones included, as a bi-encoder sees it.

    Attributes:
        vectors: its own (N = 1).
        own: Lq, bool, false at special tokens.
        start, last: 1 × Lq × d states where the upper half of the layers begins and of the last layer; None where not asked for.
    """

    vectors: Vectors
    own: Tensor
    start: Tensor | None = None
    last: Tensor | None = None


class BiEncoder:
    """Any checkpoint folder in the layout of sentence-transformers (modules.json), or a bare transformer (mean pooling).

    Args:
        folder: the checkpoint.
        name: what messages and results call it.
        subspace: d × r orthonormal projection of token vectors; None: the one shipped for these very weights, or none.
        device: torch device.
        runtime, precision: as models.runtimes.choose takes them; norms, pooling and what is kept stay as they are.

    Raises:
        UserError: no such checkpoint, a runtime that cannot be had, or a module that is not known here.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        subspace: Tensor | None = None,
        device: torch.device | str = "cpu",
        runtime: str = "auto",
        precision: str = "fp32",
    ):
        from transformers import AutoModel

        self.name, self.folder, self.device = name, folder, torch.device(device)
        modules = _modules(folder)
        root = folder / modules["Transformer"][0]
        model, tokenizer = load_checkpoint(AutoModel, root, name, spare="pooler")
        self.model: nn.Module = model.to(self.device)
        self.config: Any = model.config
        settings = _json(root / "sentence_bert_config.json")
        self.lower = bool(settings.get("do_lower_case"))
        limits = [settings.get("max_seq_length"), tokenizer.model_max_length, places(self.config)]
        self.specials: int = tokenizer.num_special_tokens_to_add(False)
        known = [n for n in limits if isinstance(n, int) and n > 0]
        self.limit: int = min(known, default=512) - self.specials
        if self.limit < 1:
            raise UserError(f"model {name!r}: a limit of {min(known)} tokens leaves none for the text")
        self.runtime, self.precision = choose(runtime, precision), precision
        reads: dict[str, Any] = {"pad_id": tokenizer.pad_token_id or 0, "token_types": "token_type_ids" in tokenizer.model_input_names}
        self.network = network(model, runtime=self.runtime, precision=precision, **reads)
        self.tokenizer = tokenizer.backend_tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        pooling = _json(folder / modules["Pooling"][0] / "config.json") if "Pooling" in modules else {}
        self.pooling = _pooling_mode(pooling, name)
        self.normalize = "Normalize" in modules
        self.dense = nn.Sequential(*(_dense(folder / path, name) for path in modules.get("Dense", []))).to(self.device)
        prompts = _json(folder / "config_sentence_transformers.json").get("prompts")
        self.prompts: dict[str, str] = {k: v for k, v in prompts.items() if isinstance(v, str)} if isinstance(prompts, dict) else {}
        if pooling.get("include_prompt") is False and (self.prompt("query") or self.prompt("document")):
            raise UserError(f"model {name!r} leaves its prompt out of the pooling (include_prompt: false), which is not known here")
        self.fingerprint, self.weights = fingerprint(folder), fingerprint(root, WEIGHTS)
        self.subspace = subspace if subspace is not None else shipped_subspace(self.weights)
        if self.subspace is not None:
            if self.subspace.ndim != 2 or self.subspace.shape[0] != self.config.hidden_size:
                raise UserError(f"subspace of shape {tuple(self.subspace.shape)} does not fit {name!r}: it needs {self.config.hidden_size} rows")
            self.subspace = self.subspace.to(self.device)

    @property
    def dimensions(self) -> int:
        """Columns of the pooled vectors."""
        linear = [module.out_features for module in self.dense.modules() if isinstance(module, nn.Linear)]
        return int(linear[-1] if linear else self.config.hidden_size)

    @property
    def token_dimensions(self) -> int:
        """Columns of the token vectors, r."""
        return int(self.config.hidden_size if self.subspace is None else self.subspace.shape[1])

    def key(self) -> str:
        """Names everything but text and token limit that a document's vectors depend on."""
        subspace = b"" if self.subspace is None else self.subspace.cpu().numpy().tobytes()
        parts = [self.fingerprint, hashlib.sha256(subspace).hexdigest(), self.arithmetic, self.device.type]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def about(self) -> dict[str, str]:
        """What people know the vectors of this `key` by."""
        return {"model": self.name, "arithmetic": self.arithmetic, "token_dimensions": str(self.token_dimensions), "weights": self.weights}

    @property
    def arithmetic(self) -> str:
        """The precision, and the runtime where it is not torch: each has roundings of its own."""
        return self.precision if self.runtime == "torch" else f"{self.precision}, {self.runtime}"

    def prompt(self, kind: str) -> str:
        """The text that the model wants in front of a query or a document."""
        names = ("query",) if kind == "query" else ("document", "passage", "corpus")
        return next((self.prompts[n] for n in names if self.prompts.get(n)), "")

    def encode(
        self,
        texts: Sequence[str],
        *,
        kind: str = "document",
        max_tokens: int = 512,
        detail: Detail = Detail.TOKENS,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Vectors:
        """Encodes N texts; an empty one has a pooled vector (of the special tokens) and no token vectors.

        Args:
            texts: any strings.
            kind: "document" or "query", which chooses the model's prompt.
            max_tokens: own tokens kept of each text, special ones not counted; the model's limit applies too.
            detail: what is wanted; STATES of a BERT alone.
            progress: called after each batch with its number of texts.

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """
        return self.encode_tokens(self.tokenize(texts, kind, max_tokens), detail=detail, progress=progress)

    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, progress: Callable[[int], object] = lambda done: None) -> Vectors:
        """What `encode` does, of texts that are tokenised already."""
        kept = [len(t) - int(t.special.sum()) if detail else 0 for t in texts]
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(kept)]).astype(np.int64))
        nnz, width = int(offsets[-1]), 2 * self.config.hidden_size * len(self.state_layers)
        pooled = torch.zeros(len(texts), self.dimensions)
        packed = {"tokens": torch.zeros(nnz, self.token_dimensions, dtype=torch.float16)}
        packed["states"] = torch.zeros(nnz if detail >= Detail.STATES else 0, width, dtype=torch.float16)
        wanted = self.state_layers if detail >= Detail.STATES else range(0)
        for batch, ends, states in forward(self.network, texts, self.device, keys_values=wanted):
            pooled[torch.from_numpy(batch)] = self._pool(states.last, ends).float().cpu()
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
        return Vectors(pooled, torch.tensor([t.wanted for t in texts], dtype=torch.int64), offsets, **packed)

    def read(self, queries: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, hidden: bool = False) -> list[Read]:
        """Queries as vectors and, with hidden=True, as the states that a one-way cross-encoder goes on from."""
        if not hidden:
            vectors = self.encode_tokens(queries, detail=detail)
            return [Read(vectors.row(i), torch.from_numpy(~query.special)) for i, query in enumerate(queries)]
        found: dict[int, Read] = {}
        nothing = torch.zeros(0, 0, dtype=torch.float16)
        for batch, ends, states in forward(self.network, queries, self.device, keep=self.state_layers.start):
            for i, a, b in zip(batch.tolist(), ends[:-1].tolist(), ends[1:].tolist()):
                start, last = states.kept[self.state_layers.start][a:b], states.last[a:b]
                own = torch.from_numpy(~queries[i].special).to(self.device)
                tokens = project_normalize(last[own], self.subspace, torch.float16)
                pooled = self._pool(last, torch.tensor([0, b - a], device=self.device)).float()
                offsets = torch.tensor([0, len(tokens)], device=self.device)
                found[i] = Read(Vectors(pooled, torch.tensor([queries[i].wanted]), offsets, tokens, nothing), own, start[None], last[None])
        return [found[i] for i in range(len(queries))]

    @property
    def state_layers(self) -> range:
        """The layers whose keys and values are kept at Detail.STATES: the upper half."""
        return range(self.config.num_hidden_layers // 2, self.config.num_hidden_layers)

    def flops(self, lengths: Tensor, detail: Detail) -> int:
        """FLOPs of encoding texts of these own tokens, with the projection of their token vectors where they are wanted."""
        lengths = lengths.clamp(max=self.limit)
        project = 2 * int(lengths.sum()) * self.subspace.numel() if detail and self.subspace is not None else 0
        return encoder_flops(self.config, lengths + self.specials) + project

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """Texts as the model reads them."""
        prompt, limit, found = self.prompt(kind), min(max_tokens, self.limit), []
        for encoding in encodings(self.tokenizer, [(prompt + text).lower() if self.lower else prompt + text for text in texts]):
            wanted = len(encoding)
            encoding.truncate(limit)
            found.append(Tokens.of(self.tokenizer.post_process(encoding), wanted))
        return found

    def _pool(self, h: Tensor, offsets: Tensor) -> Tensor:
        match self.pooling:
            case "cls":
                vector = h[offsets[:-1]]
            case "lasttoken":
                vector = h[offsets[1:] - 1]
            case "max":
                vector = torch.stack([h[a:b].amax(0) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())])
            case _ if self.normalize and not len(self.dense):
                return pool_normalize(h, offsets)
            case _:
                vector = torch.stack([h[a:b].mean(0) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())])
        vector = self.dense(vector)
        return normalize(vector, dim=-1) if self.normalize else vector


def fingerprint(folder: Path, names: Sequence[str] = (*WEIGHTS, "*config*.json", "tokenizer.json", "modules.json")) -> str:
    """SHA-256 over the files that decide a checkpoint's output: weights, configurations, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted({p for name in names for p in folder.rglob(name)}):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def shipped_subspace(model_fingerprint: str) -> Tensor | None:
    """The projection that the package carries for a model with this fingerprint (experiments/fit_subspace.py)."""
    from safetensors import safe_open

    for path in sorted((Path(__file__).parent.parent / "data" / "subspaces").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("model") == model_fingerprint:
                V: Tensor = file.get_tensor("V")
                return V
    return None


def _json(path: Path) -> dict[str, Any]:
    value = _parse(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def _modules(folder: Path) -> dict[str, list[str]]:
    """Module kind → paths in the folder, from modules.json (the last part of the type's dotted name)."""
    path = folder / "modules.json"
    if not path.is_file():
        return {"Transformer": [""]}
    modules: dict[str, list[str]] = {}
    try:
        for module in _parse(path):
            modules.setdefault(module["type"].rsplit(".", 1)[-1], []).append(module["path"])
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: must list modules, each with type and path") from None
    unknown = set(modules) - {"Transformer", "Pooling", "Dense", "Normalize"}
    if unknown or "Transformer" not in modules:
        raise UserError(f"{path}: only Transformer, Pooling, Dense and Normalize modules are known, not {', '.join(sorted(unknown)) or modules}")
    return modules


def _pooling_mode(config: dict[str, Any], name: str) -> str:
    if "pooling_mode" in config:
        modes = [config["pooling_mode"]] if not isinstance(config["pooling_mode"], list) else config["pooling_mode"]
    else:
        modes = [
            key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
            for key, on in config.items()
            if key.startswith("pooling_mode_") and on
        ]
    modes = modes or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        raise UserError(f"model {name!r} pools by {', '.join(map(str, modes))}; known are {', '.join(POOLINGS)}, one at a time")
    return str(modes[0])


def _dense(folder: Path, name: str) -> nn.Sequential:
    config = _json(folder / "config.json")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise UserError(f"model {name!r}: a Dense module with a residual or on token vectors is not known here")
    try:
        linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        weights = folder / "model.safetensors"
        state = load_file(weights) if weights.is_file() else torch.load(folder / "pytorch_model.bin", weights_only=True)
        linear.load_state_dict({key.removeprefix("linear."): value for key, value in state.items()})
    except Exception as error:  # torch, pickle and safetensors raise their own; each means the same to the user
        raise UserError(f"model {name!r}: {folder} is no whole Dense module: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh").rsplit(".", 1)[-1]
    if activation not in ("Tanh", "Identity", "ReLU", "GELU"):
        raise UserError(f"model {name!r}: activation {activation} of its Dense module is not known")
    return nn.Sequential(linear, getattr(nn, activation)()).eval()
