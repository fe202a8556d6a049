"""The one call that the command line, the endpoint and a notebook share."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rerank_kernels import exactly, zscore
from rerank_lab import inputs
from rerank_lab.datasets import valid_text
from rerank_lab.errors import ModelError, UserError
from rerank_lab.inputs import Document
from rerank_lab.methods import DROPPED, Method, Pool, as_method
from rerank_lab.methods.pool import Flops
from rerank_lab.models import DEFAULT_CROSS, DEFAULT_MODEL, load_bi_encoder, load_cross_encoder
from rerank_lab.models.bi_encoder import BiEncoder, Detail
from rerank_lab.models.cache import DISK_BYTES, Progress, VectorCache, ensure, text_key
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.one_way import OneWayCrossEncoder
from rerank_lab.run import order
from rerank_lab.timing import Clock

EXACT = "torch, fp32"
_TURNS = threading.Lock()  # of `rerank`
BLOCK = 1 << 16  # documents whose pooled vectors are held at once where a whole corpus is looked at: 100 MB at 384 dimensions
AnyPool = TypeVar("AnyPool", bound=Pool)


@dataclass(frozen=True)
class Result:
    """One document in its new place.

    Attributes:
        index: its place in the input.
        relevance_score: as the method shows it (cosine for fast, 0 to 1 for the others).
        document: as it was given.
    """

    index: int
    relevance_score: float
    document: Document


@dataclass(frozen=True)
class Ranking:
    """What a method made of one pool.

    Attributes:
        order: positions in the input, best first; those that stage 1 dropped are absent.
        scores: the raw scores in that order, fp32.
        relevance: the shown scores in that order, fp64.
        seconds: by phase.
        flops: counted by formula.
        truncated: documents of which some model read only a part.
        tokens: read for it, cached or not (Pool.tokens).
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

    What a process has set of torch (default dtype and device, autocast, precision of products) and numpy changes no score.

    Args:
        model: bi-encoder, by registry id, folder or hub name, or loaded already; so is model_cross. A Path is a folder or file, never an id.
        method: "fast", "standard", "optimal" or "best", with settings as in "best:tau=0.05".
        model_cross: cross-encoder, the file of a one-way adapter (.safetensors) too; joins best where it is given. None: "minilm-cross" for standard and optimal, none for best.
        max_tokens_per_doc: own tokens kept of each document; the model's limit applies too.
        fuse_first_stage: weight of z(first-stage score), added to z(method's score); `rank` is then given such scores.
        cache_dir: folder or URL (fsspec) for vectors that outlive the process; None: in memory alone, at most 2 GiB.
        cache_bytes: bound on what the folder holds of one model.
        subspace: safetensors file with the model's projection V; None: the shipped one, or none.
        device: "auto", "cpu", "cuda", "mps", or torch's own.
        runtime: "auto", "torch", "compile", "onnx", "openvino"; what runs the transformers.
        precision: "fp32", "bf16", "int8"; of the transformers.

    Raises:
        UserError (a ValueError): a model that is not to be found or has another role, an unknown method or setting,
            a method without the model that it needs, an argument of another type.
    """

    @exactly(tensors=True)
    def __init__(
        self,
        model: str | Path | BiEncoder | None = DEFAULT_MODEL,
        method: str | Method = "best",
        model_cross: str | Path | CrossEncoder | OneWayCrossEncoder | None = None,
        *,
        max_tokens_per_doc: int = 512,
        fuse_first_stage: float = 0.0,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DISK_BYTES,
        subspace: str | Path | None = None,
        device: str | torch.device = "auto",
        runtime: str = "auto",
        precision: str = "fp32",
    ):
        self.max_tokens, self.cache_bytes = inputs.whole("max_tokens_per_doc", max_tokens_per_doc), inputs.whole("cache_bytes", cache_bytes, 0)
        self.fuse_first_stage, self.method = inputs.weight("fuse_first_stage", fuse_first_stage), as_method(method)
        if model_cross is None and "cross-encoder" in self.method.roles:
            model_cross = DEFAULT_CROSS
        first, second = _model("model", model, BiEncoder), _model("model_cross", model_cross, CrossEncoder, OneWayCrossEncoder)
        subspace, cache_dir = inputs.path("subspace", subspace), inputs.path("cache_dir", cache_dir)
        if not isinstance(device, (str, torch.device)):
            raise UserError(f"device must be a name, such as 'cpu' or 'cuda:0', or a torch.device, not {device!r}")
        place = {"device": str(device), "runtime": runtime, "precision": precision}
        self.arguments: dict[str, Any] = {
            "model": first, "model_cross": second, "fuse_first_stage": self.fuse_first_stage, "cache_dir": cache_dir, "cache_bytes": self.cache_bytes,
            "subspace": subspace, **place,
        }  # fmt: skip
        _check_roles(self.method, first, second)
        self.encoder: BiEncoder | None = load_bi_encoder(first, subspace=subspace, **place) if isinstance(first, str) else first
        self.cross = load_cross_encoder(second, encoder=self.encoder, **place) if isinstance(second, str) else second
        self._new_caches(cache_dir)

    def __copy__(self) -> Reranker:
        other = object.__new__(Reranker)
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[Callable[..., Reranker], tuple[Any, ...]]:
        """Travels to other processes as names and settings, without weights and vectors; they are loaded there, once a process."""
        if not all(isinstance(self.arguments[name], str | None) for name in ("model", "model_cross")):
            raise TypeError("a Reranker of models that were loaded elsewhere cannot travel: name them instead")
        return _travelled, (tuple(sorted(self.arguments.items())), self.method, self.cross is not None, self.max_tokens)

    def rank(self, query: str, documents: Iterable[Document], top_n: int | None = None, *, first_stage: Iterable[float] | None = None) -> list[Result]:
        """Ranks documents for a query, best first, equal scores in input order.

        Args:
            query: holds at least one non-blank character.
            documents: strings, or mappings with the string under `text`, in any ordered collection, taken by position whatever an index says; at
                least one. Empty texts are fine.
            top_n: results wanted; more than there are: all. optimal and best give at most stage1_top_k.
            first_stage: scores of the documents, used by fuse_first_stage, which wants them where it is above 0.

        Raises:
            UserError (a ValueError): wrong input, with its place. ModelError: a model gave a NaN.
        """
        wanted = None if top_n is None else inputs.whole("top_n", top_n)
        given = inputs.documents(documents)
        ranking = self._score(query, given, first_stage)
        shown = zip(ranking.order[:wanted], ranking.relevance.tolist())
        return [Result(i, relevance, given[i]) for i, relevance in shown]

    def score(self, query: str, texts: Iterable[Document], *, first_stage: Iterable[float] | None = None) -> Ranking:
        """What `rank` does, with raw scores, time and FLOPs beside the order."""
        return self._score(query, inputs.documents(texts), first_stage)

    @exactly(tensors=True)
    def _score(self, query: str, documents: Sequence[Document], first_stage: Iterable[float] | None) -> Ranking:
        texts = [inputs.text_of(document, i) for i, document in enumerate(documents)]
        ranking = self.finish(self.pool(Pool, query, texts), self._first(first_stage, len(texts)))
        self.trim()
        return ranking

    def _first(self, first_stage: Iterable[float] | None, count: int) -> Tensor | None:
        """First-stage scores, where they are given; those that are fused must be."""
        if first_stage is None and self.fuse_first_stage:
            raise UserError("first_stage is wanted, a score for each document: fuse_first_stage adds it; or leave fuse_first_stage out")
        return None if first_stage is None else inputs.scores(first_stage, count)

    def trim(self) -> None:
        """Keeps the caches to their bounds; called when nothing is about to be gathered."""
        for cache in (self.cache, self.cross_cache):
            if cache is not None:
                cache.trim()

    def pool(self, kind: Callable[..., AnyPool], query: str, texts: Sequence[str]) -> AnyPool:
        """The query and its documents, with these models to look at them.

        Raises:
            UserError: a blank query, no documents, half of a surrogate pair.
        """
        if not isinstance(query, str) or not query.strip():
            raise UserError("the query must be a string that holds at least one non-blank character")
        if not texts:
            raise UserError("documents must hold at least one item")
        for name, text in [("the query", query), *((f"documents[{i}]", text) for i, text in enumerate(texts))]:
            if not valid_text(text):
                raise UserError(f"{name} holds half of a surrogate pair, which is no text")
        cross = self.cross if self.cross is not None and self.method.uses_cross else None
        return kind(
            query, texts, encoder=self.encoder, cache=self.cache, cross=cross, cross_cache=self.cross_cache,
            detail=self.detail if self.cross_cache is self.cache else min(self.detail, Detail.TOKENS if self.method.tokens else Detail.POOLED),
            max_tokens=self.max_tokens, clock=Clock(None if self.encoder is None else self.encoder.device),
        )  # fmt: skip

    @exactly(tensors=True)
    def finish(self, pool: Pool, first_stage: Iterable[float] | None = None) -> Ranking:
        """Scores a pool and puts its documents in order."""
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
        """The same loaded models and cache under another method; cross=False hides the cross-encoder."""
        other = copy.copy(self)
        other.method = as_method(method)
        other.cross = self.cross if cross else None
        _check_roles(other.method, self.encoder, other.cross)
        return other

    def reading(self, max_tokens_per_doc: int) -> Reranker:
        """The same with another bound on a document's tokens."""
        other = copy.copy(self)
        other.max_tokens = inputs.whole("max_tokens_per_doc", max_tokens_per_doc)
        return other

    def without_cache(self) -> Reranker:
        """The same with an empty cache in memory: every document is new."""
        other = copy.copy(self)
        other._new_caches(None)
        return other

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(model.device for model in (self.encoder, self.cross) if model is not None)

    @property
    def arithmetic(self) -> str:
        """Runtime and precision of the transformers: EXACT is what others are compared with."""
        model = self.encoder or (self.cross.encoder if isinstance(self.cross, OneWayCrossEncoder) else self.cross)
        assert model is not None
        return f"{model.runtime}, {model.precision}"

    @property
    def cache_state(self) -> str:
        """Where vectors are kept: "disk", "memory", or "none" without a bi-encoder."""
        cache = self.cache if self.cache is not None else self.cross_cache
        return "none" if cache is None else "memory" if cache.folder is None else "disk"

    @property
    def detail(self) -> Detail:
        """What a document's cached vectors hold for the method."""
        if self.method.uses_cross and isinstance(self.cross, OneWayCrossEncoder):
            return Detail.STATES
        return Detail.TOKENS if self.method.tokens else Detail.POOLED

    @property
    def caches(self) -> bool:
        """Whether the method has anything to cache of a document."""
        return "bi-encoder" in self.method.roles or self.detail is Detail.STATES

    @property
    def token_limit(self) -> int:
        """Own tokens of a document that the method's models can read; a cross-encoder shares them with the query."""
        return min(self.token_limits, default=self.max_tokens)

    @property
    def token_limits(self) -> list[int]:
        """The same, model by model."""
        cross = self.cross if self.method.uses_cross else None
        models = [model for model in (self.encoder if "bi-encoder" in self.method.roles else None, cross) if model is not None]
        return [min(self.max_tokens, model.limit) for model in models]

    def fingerprints(self) -> dict[str, str | None]:
        """What identifies models and their settings in results: name and hash of each, and what a folder asks for beyond the usual."""
        found: dict[str, str | None] = {
            "model": None if self.encoder is None else self.encoder.name,
            "model_vectors": None if self.encoder is None else self.encoder.key(),
            "model_cross": None if self.cross is None else self.cross.name,
            "model_cross_files": None if self.cross is None else self.cross.fingerprint,
            "arithmetic": self.arithmetic,
        }
        for role, model in (("model_reading", self.encoder), ("model_cross_reading", self.cross)):
            if isinstance(model, BiEncoder | CrossEncoder) and (reading := model.checkpoint.reading()):
                found[role] = reading
        return found

    def encode(self, texts: Sequence[str], *, detail: Detail, progress: Progress = lambda done, total: None) -> None:
        """Puts documents' vectors into the cache, so that ranking them later costs no forward."""
        for encoder, cache, own in self._makers(detail):
            ensure(encoder, cache, texts, max_tokens=self.max_tokens, detail=own, progress=progress, keep=False)

    def lacks(self, texts: Sequence[str], *, detail: Detail) -> list[bool]:
        """Which of these documents `encode` would have to read."""
        makers = [(cache, own, min(self.max_tokens, encoder.limit)) for encoder, cache, own in self._makers(detail)]
        return [not all(cache.has(text_key(text, limit), own) for cache, own, limit in makers) for text in texts]

    def _makers(self, detail: Detail) -> Iterator[tuple[BiEncoder, VectorCache, Detail]]:
        """Who makes vectors of documents, into which cache, in which detail."""
        if self.encoder is not None and self.cache is not None:
            yield self.encoder, self.cache, detail if self.cross_cache in (None, self.cache) else min(detail, Detail.TOKENS)
        if isinstance(self.cross, OneWayCrossEncoder) and self.cross_cache is not None and self.cross_cache is not self.cache and detail is Detail.STATES:
            yield self.cross.encoder, self.cross_cache, detail

    @exactly(tensors=True)
    def pooled(self, texts: Sequence[str], *, kind: str = "document", progress: Progress = lambda done, total: None) -> Tensor:
        """Pooled vectors, N × d, through the cache."""
        if self.encoder is None or self.cache is None:
            raise UserError("a bi-encoder is needed for pooled vectors: name one as model")
        limit = self.max_tokens if kind == "document" else self.encoder.limit
        keys = ensure(self.encoder, self.cache, texts, max_tokens=limit, detail=Detail.POOLED, kind=kind, progress=progress)
        return self.cache.gather(keys, Detail.POOLED).pooled

    @property
    def similarity(self) -> str:
        """How pooled vectors are compared: "cosine", or "dot" where the bi-encoder's checkpoint says so."""
        return "cosine" if self.encoder is None else self.encoder.similarity

    def pooled_blocks(self, texts: Sequence[str], *, size: int = BLOCK, progress: Progress = lambda done, total: None) -> Iterator[Tensor]:
        """The same in blocks of `size` documents, so that a corpus that does not fit in memory can be looked at."""
        for start in range(0, len(texts), size):
            yield self.pooled(texts[start : start + size], progress=progress)
            if self.cache is not None:
                self.cache.trim()

    def refresh(self) -> None:
        """Sees the vectors that other processes have put into the cache since."""
        for cache in {id(c): c for c in (self.cache, self.cross_cache) if c is not None}.values():
            cache.refresh()

    def _new_caches(self, folder: str | Path | None) -> None:
        """One for the bi-encoder and one for a one-way cross-encoder's backbone, which is the same where they are."""
        read = self.cross.encoder if isinstance(self.cross, OneWayCrossEncoder) else None

        def new(encoder: BiEncoder) -> VectorCache:
            return VectorCache(encoder.key(), folder, disk_bytes=self.cache_bytes, about=encoder.about())

        self.cache = None if self.encoder is None else new(self.encoder)
        self.cross_cache = self.cache if read is self.encoder else None if read is None else new(read)

    def _names(self) -> str:
        return " and ".join(model.name for model in (self.encoder, self.cross) if model is not None)


def rerank(query: str, documents: Iterable[Document], *, top_n: int | None = None, first_stage: Iterable[float] | None = None, **options: Any) -> list[Result]:
    """Reranker(**options).rank(query, documents, top_n), with the last few rerankers kept loaded; threads take turns, since a cache is one thread's."""
    with _TURNS:
        try:
            hash(tuple(options.values()))
        except TypeError:  # of no type that an option has: Reranker says so
            return Reranker(**options).rank(query, documents, top_n, first_stage=first_stage)
        files = inputs.state(*(options.get(name) for name in ("model", "model_cross", "subspace")))  # what is saved there anew is loaded anew
        return _kept(files, **dict(sorted(options.items()))).rank(query, documents, top_n, first_stage=first_stage)


@lru_cache(maxsize=4, typed=True)  # 1, 1.0 and True are equal, and not the same setting
def _kept(files: object, **options: Any) -> Reranker:
    return Reranker(**options)


def _travelled(arguments: tuple[tuple[str, Any], ...], method: Method, cross: bool, max_tokens: int) -> Reranker:
    return _loaded(arguments).using(method, cross=cross).reading(max_tokens)


@lru_cache(maxsize=2)  # a row's models, and the same in fp32 beside them
def _loaded(arguments: tuple[tuple[str, Any], ...]) -> Reranker:
    named = dict(arguments)
    return Reranker(method="fast" if named["model"] is not None else "standard", **named)


def _model(name: str, given: Any, *kinds: type) -> Any:
    named = inputs.model(name, given)
    if named is not None and not isinstance(named, (str, *kinds)):
        raise UserError(f"{name} must be an id, a folder or a hub name, or a {' or '.join(kind.__name__ for kind in kinds)} of rerank_lab, not {given!r:.100}")
    return named


def _check_roles(method: Method, model: object, cross: object) -> None:
    if "cross-encoder" in method.roles and cross is None:
        raise UserError(f"method {method.name} needs a cross-encoder: name one as model_cross (--model-cross), minilm-cross, a hub name or a folder")
    if "bi-encoder" in method.roles and model is None:
        raise UserError(f"method {method.name} needs a bi-encoder: name one as model (--model)")


__all__ = ["Ranking", "Reranker", "Result", "rerank"]
