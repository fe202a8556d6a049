"""Loaded models with the caches of what they make, and the description that they are loaded from, here or in another process."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rerank_lab.cache.vectors import DISK_BYTES, Progress, VectorCache, ensure, text_key
from rerank_lab.models.base import Detail, Encoder, Scorer
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from rerank_lab.models.registry import DEFAULT_MODEL

Caches = Mapping[int, VectorCache]  # by id() of the encoder that makes their vectors


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is loaded from. Another device or cache is `replace(spec, …)`.

    Attributes:
        model: bi-encoder, by registry id, folder or hub name; None: none.
        model_cross: cross-encoder, by the same, or the file of an adapter; None: none.
        subspace: safetensors file with the projection of the bi-encoder's tokens; None: the shipped one, or none.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        runtime, precision: of the transformers, as models.runtimes.choose takes them.
        cache_dir: folder or URL for vectors that outlive the process; None: in memory alone.
        cache_bytes: bound on what that folder holds of one model.
    """

    model: str | None = DEFAULT_MODEL
    model_cross: str | None = None
    subspace: str | None = None
    device: str = "auto"
    runtime: str = "auto"
    precision: str = "fp32"
    cache_dir: str | None = None
    cache_bytes: int = DISK_BYTES

    def load(self, model: Encoder | None = None, model_cross: Scorer | None = None) -> Engine:
        """Loads what it names.

        Args:
            model, model_cross: loaded already, in place of those that are named; such an engine cannot travel to another process.

        Raises:
            UserError: a model that is not to be found or has another role.
        """
        place = {"device": self.device, "runtime": self.runtime, "precision": self.precision}
        named = model is None and model_cross is None
        if model is None and self.model is not None:
            model = load_bi_encoder(self.model, subspace=self.subspace, **place)
        if model_cross is None and self.model_cross is not None:
            model_cross = load_cross_encoder(self.model_cross, encoder=model, **place)
        return Engine(model, model_cross, new_caches(model, model_cross, self.cache_dir, self.cache_bytes), self if named else None)


class Engine:
    """Models that are loaded, and a cache for each encoder among them.

    Args:
        encoder: makes vectors.
        cross: scores pairs.
        caches: of the vectors of `encoder`, and of the encoder that `cross` needs.
        spec: what all of it was loaded from; None: it was put together here and cannot travel.
    """

    def __init__(self, encoder: Encoder | None, cross: Scorer | None, caches: Caches, spec: EngineSpec | None = None):
        self.encoder, self.cross, self.caches, self.spec = encoder, cross, caches, spec

    def __reduce__(self) -> tuple[Callable[[], Engine], tuple[()]]:
        """Travels to other processes as its description, without weights and vectors; it is loaded anew there."""
        if self.spec is None:
            raise TypeError("a Reranker of models that were loaded elsewhere cannot travel: name them instead")
        return self.spec.load, ()

    def elsewhere(self, **changes: str | int | None) -> Engine:
        """The same here, described as it is loaded in other processes: with another device, say."""
        return Engine(self.encoder, self.cross, self.caches, None if self.spec is None else replace(self.spec, **changes))  # type: ignore[arg-type]

    def fresh(self) -> Engine:
        """The same models with empty caches in memory."""
        return Engine(self.encoder, self.cross, new_caches(self.encoder, self.cross), self.spec)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self._any().device

    @property
    def arithmetic(self) -> str:
        """Runtime and precision of the transformers."""
        return f"{self._any().runtime}, {self._any().precision}"

    def _any(self) -> Encoder | Scorer:
        return next(model for model in (self.encoder, self.cross) if model is not None)

    @property
    def cache_state(self) -> str:
        """Where vectors are kept: "disk", "memory", or "none" where no model makes any."""
        cache = next(iter(self.caches.values()), None)
        return "none" if cache is None else "memory" if cache.folder is None else "disk"

    def trim(self) -> None:
        """Keeps the caches to their bounds; called when nothing is about to be gathered."""
        for cache in self.caches.values():
            cache.trim()

    def refresh(self) -> None:
        """Sees the vectors that other processes have put into the caches since."""
        for cache in self.caches.values():
            cache.refresh()

    def encode(self, texts: Sequence[str], max_tokens: int, detail: Detail, progress: Progress) -> None:
        """Puts documents' vectors into the caches.

        Args:
            texts: any strings.
            max_tokens: own tokens kept of each.
            detail: the richest that is wanted of a document.
            progress: as cache.vectors.ensure takes it.
        """
        for encoder, own in self._makers(detail):
            ensure(encoder, self.caches[id(encoder)], texts, max_tokens=max_tokens, detail=own, progress=progress, keep=False)

    def lacks(self, texts: Sequence[str], max_tokens: int, detail: Detail) -> list[bool]:
        """Which of these documents `encode` would have to read."""
        makers = [(self.caches[id(encoder)], own, min(max_tokens, encoder.limit)) for encoder, own in self._makers(detail)]
        return [not all(cache.has(text_key(text, limit), own) for cache, own, limit in makers) for text in texts]

    def _makers(self, detail: Detail) -> Iterator[tuple[Encoder, Detail]]:
        """Who makes vectors, and in which detail: what a scorer needs beyond tokens is made by its own encoder alone."""
        needs = None if self.cross is None else self.cross.needs
        other = needs if needs is not None and needs.encoder is not self.encoder else None
        if self.encoder is not None:
            yield self.encoder, detail if other is None else min(detail, Detail.TOKENS)
        if other is not None and detail >= other.detail:
            yield other.encoder, other.detail


class Engines:
    """Engines by what they are loaded from, the last few of them; they belong to whoever made this.

    Args:
        most: how many stay loaded.
    """

    def __init__(self, most: int = 2):
        self.most = most
        self.loaded: OrderedDict[EngineSpec, Engine] = OrderedDict()

    def get(self, spec: EngineSpec) -> Engine:
        """The engine, loaded where it is not yet.

        Raises:
            UserError: as EngineSpec.load.
        """
        self.loaded[spec] = self.loaded.pop(spec) if spec in self.loaded else spec.load()
        while len(self.loaded) > self.most:
            self.loaded.popitem(last=False)
        return self.loaded[spec]


def packed(value: Any, **changes: str | int | None) -> bytes:
    """What ranks as bytes for another process; of its engines only what they are loaded from.

    Args:
        value: a Reranker, or what holds one.
        changes: of the EngineSpecs, as they are loaded there.

    Raises:
        TypeError: an engine of models that were not loaded by name.
    """
    buffer = io.BytesIO()
    _Packing(buffer, changes).dump(value)
    return buffer.getvalue()


def unpacked(content: bytes, engines: Engines) -> Any:
    """What was packed, on engines that are loaded here.

    Raises:
        UserError: as EngineSpec.load.
    """
    return _Unpacking(io.BytesIO(content), engines).load()


class _Packing(pickle.Pickler):
    def __init__(self, file: io.BytesIO, changes: Mapping[str, str | int | None]):
        super().__init__(file)
        self.changes = changes

    def persistent_id(self, value: Any) -> EngineSpec | None:
        if not isinstance(value, Engine):
            return None
        value.__reduce__()  # or it cannot travel
        assert value.spec is not None
        return replace(value.spec, **self.changes)  # type: ignore[arg-type]


class _Unpacking(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, engines: Engines):
        super().__init__(file)
        self.engines = engines

    def persistent_load(self, spec: EngineSpec) -> Engine:
        return self.engines.get(spec)


def encoders(encoder: Encoder | None, cross: Scorer | None) -> list[Encoder]:
    """Those that make vectors of documents for these models, each once."""
    needed = None if cross is None or cross.needs is None else cross.needs.encoder
    return list({id(one): one for one in (encoder, needed) if one is not None}.values())


def new_caches(encoder: Encoder | None, cross: Scorer | None, folder: str | None = None, disk_bytes: int = DISK_BYTES) -> dict[int, VectorCache]:
    """An empty cache for each encoder of these models, or what a folder or URL holds of its vectors."""
    return {id(one): VectorCache(one.key(), folder, disk_bytes=disk_bytes, about=one.about()) for one in encoders(encoder, cross)}
