"""The one call that the command line, the endpoint and a notebook share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rerank_kernels import exactly, zscore
from rerank_lab.cache.vectors import DISK_BYTES, Progress, VectorCache, ensure
from rerank_lab.datasets.runs import order
from rerank_lab.engine import Engine, EngineSpec
from rerank_lab.errors import ModelError, UserError
from rerank_lab.files import valid_text
from rerank_lab.methods import DROPPED, Method, Pool, as_method, inputs
from rerank_lab.methods.inputs import Document
from rerank_lab.methods.pool import Flops
from rerank_lab.models.base import Detail, Encoder, Scorer
from rerank_lab.models.registry import DEFAULT_CROSS, DEFAULT_MODEL
from rerank_lab.timing import Clock

EXACT = "torch, fp32"
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
    ):
        max_tokens, cache_bytes = inputs.whole("max_tokens_per_doc", max_tokens_per_doc), inputs.whole("cache_bytes", cache_bytes, 0)
        fuse, method = inputs.weight("fuse_first_stage", fuse_first_stage), as_method(method)
        if model_cross is None and "cross-encoder" in method.roles:
            model_cross = DEFAULT_CROSS
        first, second = _model("model", model, Encoder, "BiEncoder"), _model("model_cross", model_cross, Scorer, "CrossEncoder or OneWayCrossEncoder")
        subspace, cache_dir = inputs.path("subspace", subspace), inputs.path("cache_dir", cache_dir)
        if not isinstance(device, (str, torch.device)):
            raise UserError(f"device must be a name, such as 'cpu' or 'cuda:0', or a torch.device, not {device!r}")
        _check_roles(method, first, second)
        named = [given if isinstance(given, str) else None for given in (first, second)]
        loaded = [None if isinstance(given, str) else given for given in (first, second)]
        spec = EngineSpec(named[0], named[1], subspace, str(device), runtime, precision, cache_dir, cache_bytes)
        self._set(spec.load(*loaded), method, max_tokens, fuse, True)

    @classmethod
    def of(cls, engine: Engine, method: str | Method, *, max_tokens_per_doc: int = 512, fuse_first_stage: float = 0.0, cross: bool = True) -> Reranker:
        """A method on models that are loaded; cross=False hides the cross-encoder.

        Raises:
            UserError: a method without the model that it needs.
        """
        made: Reranker = object.__new__(cls)
        made._set(engine, as_method(method), max_tokens_per_doc, fuse_first_stage, cross)
        _check_roles(made.method, made.encoder, made.cross)
        return made

    def _set(self, engine: Engine, method: Method, max_tokens: int, fuse_first_stage: float, cross: bool) -> None:
        self.engine, self.method, self.max_tokens, self.fuse_first_stage = engine, method, max_tokens, fuse_first_stage
        self.encoder, self.cross = engine.encoder, engine.cross if cross else None
        self.scorer = self.cross if method.uses_cross else None  # what the method will ask

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
        self.engine.trim()
        return ranking

    def _first(self, first_stage: Iterable[float] | None, count: int) -> Tensor | None:
        """First-stage scores, where they are given; those that are fused must be."""
        if first_stage is None and self.fuse_first_stage:
            raise UserError("first_stage is wanted, a score for each document: fuse_first_stage adds it; or leave fuse_first_stage out")
        return None if first_stage is None else inputs.scores(first_stage, count)

    def pool(self, kind: Callable[..., AnyPool], query: str, texts: Sequence[str]) -> AnyPool:
        """The query and its documents, with these models to look at them.

        Raises:
            UserError: a blank query, no documents, half of a surrogate pair.
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
        """The same loaded models and caches under another method; cross=False hides the cross-encoder."""
        shown = cross and self.cross is not None
        return Reranker.of(self.engine, method, max_tokens_per_doc=self.max_tokens, fuse_first_stage=self.fuse_first_stage, cross=shown)

    def reading(self, max_tokens_per_doc: int) -> Reranker:
        """The same with another bound on a document's tokens."""
        return self._changed(max_tokens=inputs.whole("max_tokens_per_doc", max_tokens_per_doc))

    def without_cache(self) -> Reranker:
        """The same with empty caches in memory: every document is new."""
        return self._changed(engine=self.engine.fresh())

    def elsewhere(self, **changes: Any) -> Reranker:
        """The same here; other processes load it with these changes of its EngineSpec."""
        return self._changed(engine=self.engine.elsewhere(**changes))

    def _changed(self, **attributes: Any) -> Reranker:
        other: Reranker = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | attributes)
        return other

    def __reduce__(self) -> tuple[Callable[..., Reranker], tuple[Engine, Method, int, float, bool]]:
        """Travels to other processes with its engine, which is loaded there (Engine.__reduce__)."""
        return _travelled, (self.engine, self.method, self.max_tokens, self.fuse_first_stage, self.cross is not None)

    @property
    def cache(self) -> VectorCache | None:
        """Vectors of the bi-encoder."""
        return None if self.encoder is None else self.engine.caches[id(self.encoder)]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.engine.device

    @property
    def arithmetic(self) -> str:
        """Runtime and precision of the transformers: EXACT is what others are compared with."""
        return self.engine.arithmetic

    @property
    def cache_state(self) -> str:
        """Where vectors are kept: "disk", "memory", or "none" where no model makes any."""
        return self.engine.cache_state

    @property
    def detail(self) -> Detail:
        """What a document's cached vectors hold for the method."""
        needed = Detail.POOLED if self.scorer is None or self.scorer.needs is None else self.scorer.needs.detail
        return max(needed, Detail.TOKENS if self.method.tokens else Detail.POOLED)

    @property
    def caches(self) -> bool:
        """Whether the method has anything to cache of a document."""
        return "bi-encoder" in self.method.roles or (self.scorer is not None and self.scorer.needs is not None)

    @property
    def token_limit(self) -> int:
        """Own tokens of a document that the method's models can read; a cross-encoder shares them with the query."""
        return min(self.token_limits, default=self.max_tokens)

    @property
    def token_limits(self) -> list[int]:
        """The same, model by model."""
        models = [model for model in (self.encoder if "bi-encoder" in self.method.roles else None, self.scorer) if model is not None]
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
            if model is not None and (reading := model.reading()):
                found[role] = reading
        return found

    def encode(self, texts: Sequence[str], *, detail: Detail, progress: Progress = lambda done, total: None) -> None:
        """Puts documents' vectors into the caches, so that ranking them later costs no forward."""
        self.engine.encode(texts, self.max_tokens, detail, progress)

    def lacks(self, texts: Sequence[str], *, detail: Detail) -> list[bool]:
        """Which of these documents `encode` would have to read."""
        return self.engine.lacks(texts, self.max_tokens, detail)

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
        """Sees the vectors that other processes have put into the caches since."""
        self.engine.refresh()

    def _names(self) -> str:
        return " and ".join(model.name for model in (self.encoder, self.cross) if model is not None)


class Kept:
    """The last few rerankers that `rerank` was asked for, loaded; `clear` frees them.

    Args:
        most: how many.
    """

    def __init__(self, most: int):
        self.most, self.turns = most, threading.Lock()
        self.rerankers: OrderedDict[tuple[Any, ...], Reranker] = OrderedDict()

    def get(self, options: Mapping[str, object]) -> Reranker:
        """The one with these options; loaded anew where something was saved at its files since."""
        files = inputs.state(*(options.get(name) for name in ("model", "model_cross", "subspace")))
        # 1, 1.0 and True are equal, and not the same setting.
        key = (files, *((name, type(value), value) for name, value in sorted(options.items())))
        try:
            found = self.rerankers.pop(key, None)
        except TypeError:  # of no type that an option has: Reranker says so
            return Reranker(**options)  # type: ignore[arg-type]
        self.rerankers[key] = found or Reranker(**options)  # type: ignore[arg-type]
        while len(self.rerankers) > self.most:
            self.rerankers.popitem(last=False)
        return self.rerankers[key]

    def clear(self) -> None:
        """Keeps none."""
        self.rerankers.clear()


kept = Kept(4)


def rerank(query: str, documents: Iterable[Document], *, top_n: int | None = None, first_stage: Iterable[float] | None = None, **options: Any) -> list[Result]:
    """Reranker(**options).rank(query, documents, top_n), with the last few rerankers kept loaded (`kept`); threads take turns, since a cache is one thread's."""
    with kept.turns:
        return kept.get(options).rank(query, documents, top_n, first_stage=first_stage)


def _travelled(engine: Engine, method: Method, max_tokens: int, fuse_first_stage: float, cross: bool) -> Reranker:
    return Reranker.of(engine, method, max_tokens_per_doc=max_tokens, fuse_first_stage=fuse_first_stage, cross=cross)


def _model(name: str, given: Any, kind: type, said: str) -> Any:
    found = inputs.model(name, given)
    if found is not None and not isinstance(found, (str, kind)):
        raise UserError(f"{name} must be an id, a folder or a hub name, or a {said} of rerank_lab, not {given!r:.100}")
    return found


def _check_roles(method: Method, model: object, cross: object) -> None:
    if "cross-encoder" in method.roles and cross is None:
        raise UserError(f"method {method.name} needs a cross-encoder: name one as model_cross (--model-cross), minilm-cross, a hub name or a folder")
    if "bi-encoder" in method.roles and model is None:
        raise UserError(f"method {method.name} needs a bi-encoder: name one as model (--model)")


__all__ = ["Ranking", "Reranker", "Result", "rerank"]
