"""The one call that the command line, the endpoint and a notebook share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rerank_kernels import exactly, zscore
from rerank_lab.cache.vectors import DISK_BYTES, ProgressCallback, VectorCache, ensure
from rerank_lab.datasets.runs import order
from rerank_lab.engine import Engine, EngineSpec, fingerprints
from rerank_lab.errors import ModelError, UserError
from rerank_lab.files import valid_text
from rerank_lab.methods import DROPPED, Method, Pool, Value, as_method, inputs
from rerank_lab.methods.inputs import Document
from rerank_lab.methods.pool import Flops
from rerank_lab.methods.spread import Spread
from rerank_lab.models.base import Detail, Encoder, Scorer
from rerank_lab.models.registry import DEFAULT_CROSS, DEFAULT_MODEL
from rerank_lab.timing import Clock

EXACT = "torch, fp32"
CORPUS_BLOCK = 1 << 16  # documents whose pooled vectors are in memory at once when a whole corpus is searched: 100 MB at 384 dimensions
AnyPool = TypeVar("AnyPool", bound=Pool)


@dataclass(frozen=True)
class Result:
    """One ranked document.

    Attributes:
        index: its position in the input.
        relevance_score: the score that the method shows: the cosine for fast, 0 to 1 for the others.
        document: as it was given.
    """

    index: int
    relevance_score: float
    document: Document


@dataclass(frozen=True)
class Ranking:
    """One query's ranked documents, with the cost of ranking them. k documents are left after stage 1.

    Attributes:
        order: k positions in the input, best first.
        scores: k raw scores in that order, fp32.
        relevance: k shown scores in that order, fp64.
        seconds: phase → seconds.
        flops: counted by formula.
        truncated: number of documents that were cut for at least one model.
        tokens: tokens read, whether their vectors were cached or not (Pool.tokens).
    """

    order: list[int]
    scores: Tensor
    relevance: Tensor
    seconds: dict[str, float]
    flops: Flops
    truncated: int
    tokens: int = 0


class Reranker:
    """Models, a method and its settings, ready to rank.

    Example:
        >>> Reranker(model="all-MiniLM-L6-v2", method="best").rank("query", ["first text", {"text": "second"}], top_n=1)

    Scores do not depend on the process's settings of torch (default dtype and device, autocast, precision of products) or numpy.

    Args:
        model: bi-encoder: a registry id, a folder, a hub name, or a loaded model. A Path is a folder or file, never an id.
        method: "fast", "standard", "optimal", "best" or "maxsim", with settings as in "best:tau=0.05".
        model_cross: cross-encoder: as for `model`, or the file of a one-way adapter (.safetensors). With best it is optional
            and adds a term. None: "minilm-cross" for standard and optimal, no cross-encoder for best.
        max_tokens_per_doc: tokens kept of each document, special ones not counted; the model's limit applies too.
        fuse_first_stage: weight of z(first-stage score), which is added to z(method's score). Above 0, `rank` needs these scores.
        cache_dir: folder or URL (fsspec) for vectors that outlive the process; None: vectors are kept in memory, at most 2 GiB.
        cache_bytes: upper bound on one model's vectors in that folder.
        subspace: safetensors file with the projection V of token vectors; None: the shipped one, or none.
        device: "auto", "cpu", "cuda", "mps", or a torch.device.
        runtime: what runs the transformers: "auto", "torch", "compile", "onnx", "openvino".
        precision: of the transformers: "fp32", "bf16", "int8".
        query_prompt, document_prompt: put before the bi-encoder's queries and documents; None: what its folder says.
        truncate_dim: components kept of the bi-encoder's pooled vectors; None: what its folder says.
        instruction: the task, for a cross-encoder whose prompt has a place for one; None: the model's own.

    Raises:
        UserError (a ValueError): a model is not found or has another role; the method or a setting is unknown; the method
            lacks a model that it needs; an argument has the wrong type.
    """

    @exactly(tensors=True)
    def __init__(
        self,
        model: str | Path | Encoder | None = DEFAULT_MODEL,
        method: str | Method = "best",
        model_cross: str | Path | Scorer | None = None,
        *,
        max_tokens_per_doc: int = 512,
        fuse_first_stage: float = 0.0,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DISK_BYTES,
        subspace: str | Path | None = None,
        device: str | torch.device = "auto",
        runtime: str = "auto",
        precision: str = "fp32",
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        truncate_dim: int | None = None,
        instruction: str | None = None,
    ):
        max_tokens, cache_bytes = inputs.whole("max_tokens_per_doc", max_tokens_per_doc), inputs.whole("cache_bytes", cache_bytes, 0)
        fuse, method = inputs.weight("fuse_first_stage", fuse_first_stage), as_method(method)
        if model_cross is None and "cross-encoder" in method.roles:
            model_cross = DEFAULT_CROSS
        first, second = _model("model", model, Encoder, "BiEncoder"), _model("model_cross", model_cross, Scorer, "CrossEncoder or OneWayCrossEncoder")
        subspace, cache_dir = inputs.path("subspace", subspace), inputs.path("cache_dir", cache_dir)
        if not isinstance(device, (str, torch.device)):
            raise UserError(f"device must be a name, such as 'cpu' or 'cuda:0', or a torch.device, not {device!r}")
        method.check_roles(first, second)
        named, loaded = zip(*((given, None) if isinstance(given, str) else (None, given) for given in (first, second)))
        asked = inputs.overrides(query_prompt, document_prompt, truncate_dim, instruction, first, second)
        spec = EngineSpec(named[0], named[1], subspace, str(device), runtime, precision, **asdict(asked), cache_dir=cache_dir, cache_bytes=cache_bytes)
        self._set(spec.load(*loaded), method, max_tokens, fuse, True)

    @classmethod
    def of(cls, engine: Engine, method: str | Method, *, max_tokens_per_doc: int = 512, fuse_first_stage: float = 0.0, cross: bool = True) -> Reranker:
        """A Reranker on models that are loaded already. cross=False hides the engine's cross-encoder from the method.

        Raises:
            UserError: the method lacks a model that it needs.
        """
        made: Reranker = object.__new__(cls)
        made._set(engine, as_method(method), max_tokens_per_doc, fuse_first_stage, cross)
        return made

    def _set(self, engine: Engine, method: Method, max_tokens: int, fuse_first_stage: float, cross: bool) -> None:
        self.engine, self.method, self.max_tokens, self.fuse_first_stage = engine, method, max_tokens, fuse_first_stage
        self.encoder, self.cross = engine.encoder, engine.cross if cross else None
        method.check_models(self.encoder, self.cross)
        _ = self.spread  # measured now if it is not known, and in no request

    def rank(self, query: str, documents: Iterable[Document], top_n: int | None = None, *, first_stage: Iterable[float] | None = None) -> list[Result]:
        """Ranks documents for a query, best first. Equal scores stay in input order.

        Args:
            query: with at least one non-blank character.
            documents: at least one string, or mapping with the string under `text`, in any ordered collection. An index (of a
                pandas Series) is ignored. Empty texts are allowed.
            top_n: how many results to return at most; None: all. optimal and best return at most stage1_top_k.
            first_stage: a score for each document; needed if fuse_first_stage is above 0.

        Raises:
            UserError (a ValueError): wrong input; the message names the argument.
            ModelError: a model gave a NaN.
        """
        wanted = None if top_n is None else inputs.whole("top_n", top_n)
        given = inputs.documents(documents)
        ranking = self._score(query, given, first_stage)
        shown = zip(ranking.order[:wanted], ranking.relevance.tolist())
        return [Result(i, relevance, given[i]) for i, relevance in shown]

    def score(self, query: str, texts: Iterable[Document], *, first_stage: Iterable[float] | None = None) -> Ranking:
        """Ranks as `rank` does, and returns raw scores, seconds and FLOPs with the order."""
        return self._score(query, inputs.documents(texts), first_stage)

    @exactly(tensors=True)
    def _score(self, query: str, documents: Sequence[Document], first_stage: Iterable[float] | None) -> Ranking:
        texts = [inputs.text_of(document, i) for i, document in enumerate(documents)]
        ranking = self.finish(self.pool(Pool, query, texts), self._first(first_stage, len(texts)))
        self.engine.trim()
        return ranking

    def _first(self, first_stage: Iterable[float] | None, count: int) -> Tensor | None:
        """First-stage scores as a tensor; None if they are neither given nor needed."""
        if first_stage is None and self.fuse_first_stage:
            raise UserError("first_stage is wanted, a score for each document: fuse_first_stage adds it; or leave fuse_first_stage out")
        return None if first_stage is None else inputs.scores(first_stage, count)

    def pool(self, kind: Callable[..., AnyPool], query: str, texts: Sequence[str]) -> AnyPool:
        """A pool of the query and its documents, for these models; `kind` is its class.

        Raises:
            UserError: the query is blank, there are no documents, or a text has half of a surrogate pair.
        """
        if not isinstance(query, str) or not query.strip():
            raise UserError("the query must be a string that holds at least one non-blank character")
        if not texts:
            raise UserError("documents must hold at least one item")
        for i, text in enumerate([query, *texts]):
            if not (text.isascii() or valid_text(text)):
                raise UserError(f"{f'documents[{i - 1}]' if i else 'the query'} holds half of a surrogate pair, which is no text")
        return kind(
            query, texts, encoder=self.encoder, cross=self.scorer, caches=self.engine.caches, detail=Detail.TOKENS if self.method.tokens else Detail.POOLED,
            max_tokens=self.max_tokens, spread=self.spread, clock=Clock(None if self.encoder is None else self.encoder.device),
        )  # fmt: skip

    @exactly(tensors=True)
    def finish(self, pool: Pool, first_stage: Iterable[float] | None = None) -> Ranking:
        """Scores a pool (from `pool`) with the method and orders its documents. Errors as for `rank`."""
        first = self._first(first_stage, len(pool))
        with torch.inference_mode():
            scores = self.method.score(pool).cpu()
            with pool.clock.phase("rank"):
                relevance = self.method.relevance(scores)
                if self.fuse_first_stage and first is not None:
                    kept = (scores != DROPPED).nonzero()[:, 0]
                    scores = pool.scatter(kept, zscore(scores[kept]) + self.fuse_first_stage * zscore(first[kept]))
                    relevance = torch.sigmoid(scores.double())
                if bool(scores.isnan().any()):
                    raise ModelError(f"method {self.method.name} gave a NaN score with model {self._names()}")
                scores, relevance = pool.unify(scores), pool.unify(relevance)
                places = [i for i in order(scores.numpy()).tolist() if scores[i] != DROPPED]
        return Ranking(places, scores[places], relevance[places], dict(pool.clock.seconds), pool.flops, pool.truncated, pool.tokens)

    def using(self, method: str | Method, *, cross: bool = True) -> Reranker:
        """The same loaded models and caches with another method. cross=False hides the cross-encoder."""
        shown = cross and self.cross is not None
        return Reranker.of(self.engine, method, max_tokens_per_doc=self.max_tokens, fuse_first_stage=self.fuse_first_stage, cross=shown)

    def with_max_tokens(self, max_tokens_per_doc: int) -> Reranker:
        """The same with another number of tokens kept of each document."""
        return self._copy_with(max_tokens=inputs.whole("max_tokens_per_doc", max_tokens_per_doc))

    def without_cache(self) -> Reranker:
        """The same with empty caches in memory, so that every document is encoded again."""
        return self._copy_with(engine=self.engine.fresh())

    def elsewhere(self, **changes: Any) -> Reranker:
        """The same reranker; other processes that unpickle it load its engine with these changes of the EngineSpec."""
        return self._copy_with(engine=self.engine.elsewhere(**changes))

    def _copy_with(self, **attributes: Any) -> Reranker:
        other: Reranker = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | attributes)
        return other

    def __reduce__(self) -> tuple[Callable[..., Reranker], tuple[Engine, Method, int, float, bool]]:
        """Pickles without models; unpickling loads the engine again (Engine.__reduce__)."""
        return _unpickle, (self.engine, self.method, self.max_tokens, self.fuse_first_stage, self.cross is not None)

    def __copy__(self) -> Reranker:
        return self._copy_with()

    @property
    def scorer(self) -> Scorer | None:
        """The cross-encoder, if the method uses it."""
        return self.cross if self.method.uses_cross else None

    @property
    def spread(self) -> Spread | None:
        """The spread of the bi-encoder's token similarities; None: the method needs none, or the models run elsewhere."""
        return self.engine.spread if self.engine.here and self.method.needs_spread() else None

    @property
    def settings(self) -> dict[str, Value]:
        """Name → value of the method's settings as they are in use: a number where "auto" was set."""
        return self.method.settings() | self.method.in_use(self.spread)

    @property
    def cache(self) -> VectorCache | None:
        """The cache of the bi-encoder's vectors; None without a bi-encoder."""
        return None if self.encoder is None else self.engine.caches[id(self.encoder)]

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return self.engine.device

    @property
    def arithmetic(self) -> str:
        """Runtime and precision of the transformers. EXACT is the reference that others are compared with."""
        return self.engine.arithmetic

    @property
    def cache_state(self) -> str:
        """Where vectors are kept: "disk", "memory", or "none" if no model makes vectors."""
        return self.engine.cache_state

    @property
    def detail(self) -> Detail:
        """The most detailed vectors of a document that the method or its scorer reads."""
        needed = Detail.POOLED if self.scorer is None or self.scorer.needs is None else self.scorer.needs.detail
        return max(needed, Detail.TOKENS if self.method.tokens else Detail.POOLED)

    @property
    def uses_cache(self) -> bool:
        """Whether the method reads vectors of documents, which a cache can hold."""
        return "bi-encoder" in self.method.roles or (self.scorer is not None and self.scorer.needs is not None)

    @property
    def token_limit(self) -> int:
        """Tokens of a document that all of the method's models can read, special ones not counted. A cross-encoder shares them with the query."""
        return min(self.token_limits, default=self.max_tokens)

    @property
    def token_limits(self) -> list[int]:
        """`token_limit` of each of the method's models."""
        models = [model for model in (self.encoder if "bi-encoder" in self.method.roles else None, self.scorer) if model is not None]
        return [min(self.max_tokens, model.limit) for model in models]

    def fingerprints(self) -> dict[str, str | None]:
        """Identifies the models in results (engine.fingerprints)."""
        return fingerprints(self.encoder, self.cross, self.arithmetic, self.spread)

    def encode(self, texts: Sequence[str], *, detail: Detail, progress: ProgressCallback = lambda done, total: None) -> None:
        """Encodes documents into the caches, in this detail, so that ranking them later runs no encoder on them. Arguments as for Engine.encode."""
        self.engine.encode(texts, self.max_tokens, detail, progress)

    def lacks(self, texts: Sequence[str], *, detail: Detail) -> list[bool]:
        """For each text, whether `encode` would have to encode it."""
        return self.engine.lacks(texts, self.max_tokens, detail)

    @exactly(tensors=True)
    def pooled(self, texts: Sequence[str], *, kind: str = "document", progress: ProgressCallback = lambda done, total: None) -> Tensor:
        """Pooled vectors of N texts of a kind ("document" or "query"), N × d, fp32, from the cache or encoded now. UserError if no encoder pools."""
        if self.encoder is None or self.cache is None:
            raise UserError("a bi-encoder is needed for pooled vectors: name one as model")
        if not self.encoder.pools:
            raise UserError(f"model {self.encoder.name!r} has no vector of a whole text, only one for each token; name a bi-encoder as model")
        limit = self.max_tokens if kind == "document" else self.encoder.limit
        keys = ensure(self.encoder, self.cache, texts, max_tokens=limit, detail=Detail.POOLED, kind=kind, progress=progress)
        return self.cache.gather(keys, Detail.POOLED).pooled

    @property
    def similarity(self) -> str:
        """How pooled vectors are compared: "cosine", or "dot" if the bi-encoder's checkpoint says so."""
        return "cosine" if self.encoder is None else self.encoder.similarity

    def pooled_blocks(self, texts: Sequence[str], *, size: int = CORPUS_BLOCK, progress: ProgressCallback = lambda done, total: None) -> Iterator[Tensor]:
        """`pooled` of documents in blocks of `size`, for a corpus whose vectors do not fit in memory."""
        for start in range(0, len(texts), size):
            yield self.pooled(texts[start : start + size], progress=progress)
            if self.cache is not None:
                self.cache.trim()

    def _names(self) -> str:
        return " and ".join(model.name for model in (self.encoder, self.cross) if model is not None)


class LoadedRerankers:
    """The rerankers that `rerank` used last, `most` of them at most. Hold the lock `turns` during `get` and while the reranker ranks: its cache is
    for one thread at a time.
    """

    def __init__(self, most: int):
        self.most, self.turns = most, threading.Lock()
        self.rerankers: OrderedDict[tuple[Any, ...], Reranker] = OrderedDict()

    def get(self, options: Mapping[str, object]) -> Reranker:
        """The reranker with these arguments. It is loaded again if its files have changed since."""
        files = inputs.files_state(*(options.get(name) for name in ("model", "model_cross", "subspace")))
        # 1, 1.0 and True are equal, and not the same setting.
        key = (files, *((name, type(value), value) for name, value in sorted(options.items())))
        try:
            found = self.rerankers.pop(key, None)
        except TypeError:  # an unhashable value, of no type that an option has: Reranker raises a UserError
            return Reranker(**options)  # type: ignore[arg-type]
        self.rerankers[key] = found or Reranker(**options)  # type: ignore[arg-type]
        while len(self.rerankers) > self.most:
            self.rerankers.popitem(last=False)
        return self.rerankers[key]

    def clear(self) -> None:
        """Frees all of them."""
        self.rerankers.clear()


loaded = LoadedRerankers(4)


def rerank(query: str, documents: Iterable[Document], *, top_n: int | None = None, first_stage: Iterable[float] | None = None, **options: Any) -> list[Result]:
    """Reranker(**options).rank(query, documents, top_n), with its arguments and errors. The last few stay loaded in `loaded`; threads take turns."""
    with loaded.turns:
        return loaded.get(options).rank(query, documents, top_n, first_stage=first_stage)


def _unpickle(engine: Engine, method: Method, max_tokens: int, fuse_first_stage: float, cross: bool) -> Reranker:
    return Reranker.of(engine, method, max_tokens_per_doc=max_tokens, fuse_first_stage=fuse_first_stage, cross=cross)


def _model(name: str, given: Any, kind: type, said: str) -> Any:
    found = inputs.model(name, given)
    if found is not None and not isinstance(found, (str, kind)):
        raise UserError(f"{name} must be an id, a folder or a hub name, or a {said} of rerank_lab, not {given!r:.100}")
    return found


__all__ = ["Ranking", "Reranker", "Result", "rerank"]
