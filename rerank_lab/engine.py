"""EngineSpec describes which models to load; an Engine is the loaded models with their vector caches. A spec can be sent to another process and loaded there."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rerank_lab.cache.vectors import DISK_BYTES, ProgressCallback, VectorCache, ensure, text_key
from rerank_lab.methods.spread import Spread, spread_of
from rerank_lab.models.base import Detail, Encoder, Overrides, Scorer
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from rerank_lab.models.registry import DEFAULT_MODEL

Caches = Mapping[int, VectorCache]  # by id() of the encoder that makes their vectors


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is loaded from. Use `replace(spec, …)` for another device or cache.

    Attributes:
        model: bi-encoder, by registry id, folder or hub name; None: no bi-encoder.
        model_cross: cross-encoder, by registry id, folder, hub name or an adapter's file; None: no cross-encoder.
        subspace: safetensors file with the projection of the bi-encoder's token vectors; None: the shipped one, or none.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        runtime, precision: of the transformers, as models.exported.choose takes them.
        query_prompt, document_prompt, truncate_dim: of the bi-encoder, in place of what its folder says; None: as the folder has it.
        instruction: of the cross-encoder, likewise.
        cache_dir: folder or URL for vectors that outlive the process; None: vectors are kept in memory only.
        cache_bytes: upper bound on one model's vectors in that folder.
    """

    model: str | None = DEFAULT_MODEL
    model_cross: str | None = None
    subspace: str | None = None
    device: str = "auto"
    runtime: str = "auto"
    precision: str = "fp32"
    query_prompt: str | None = None
    document_prompt: str | None = None
    truncate_dim: int | None = None
    instruction: str | None = None
    cache_dir: str | None = None
    cache_bytes: int = DISK_BYTES

    def load(self, model: Encoder | None = None, model_cross: Scorer | None = None) -> Engine:
        """Loads the models that the spec names.

        Args:
            model, model_cross: models that are loaded already, used instead of the named ones. Such an engine cannot be pickled.

        Raises:
            UserError: a model is not found or has another role.
        """
        named = model is None and model_cross is None
        if model is None and self.model is not None:
            asked = Overrides(self.query_prompt, self.document_prompt, self.truncate_dim)
            model = load_bi_encoder(self.model, subspace=self.subspace, device=self.device, runtime=self.runtime, precision=self.precision, overrides=asked)
        if model_cross is None and self.model_cross is not None:
            asked = Overrides(instruction=self.instruction)
            model_cross = load_cross_encoder(
                self.model_cross, encoder=model, device=self.device, runtime=self.runtime, precision=self.precision, overrides=asked
            )
        return Engine(model, model_cross, new_caches(model, model_cross, self.cache_dir, self.cache_bytes), self if named else None)


class Engine:
    """Loaded models, with a vector cache for each encoder.

    Args:
        encoder: makes vectors; None: no bi-encoder.
        cross: scores pairs; None: no cross-encoder.
        caches: one for `encoder`, and one for the encoder that `cross` needs.
        spec: what the models were loaded from; None: they were passed in loaded, and the engine cannot be pickled.
        spreads: id() of an encoder → the spread of its token similarities, filled on demand. Engines of the same encoders share it.
        here: whether its models run in this process; False: they describe those of other processes.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        cross: Scorer | None,
        caches: Caches,
        spec: EngineSpec | None = None,
        spreads: dict[int, Spread] | None = None,
        here: bool = True,
    ):
        self.encoder, self.cross, self.caches, self.spec, self.here = encoder, cross, caches, spec, here
        self.spreads = {} if spreads is None else spreads

    def __reduce__(self) -> tuple[Callable[[], Engine], tuple[()]]:
        """Pickles the spec without weights and vectors. Unpickling loads the models again."""
        if self.spec is None:
            raise TypeError("a Reranker of models that were loaded elsewhere cannot travel: name them instead")
        return self.spec.load, ()

    def elsewhere(self, **changes: str | int | None) -> Engine:
        """The same engine, with a changed spec, for other processes: those that unpickle it load it with these changes, such as another device."""
        spec = None if self.spec is None else replace(self.spec, **changes)  # type: ignore[arg-type]
        return Engine(self.encoder, self.cross, self.caches, spec, self.spreads, here=False)

    def fresh(self) -> Engine:
        """The same models with empty caches in memory."""
        return Engine(self.encoder, self.cross, new_caches(self.encoder, self.cross), self.spec, self.spreads, self.here)

    @property
    def spread(self) -> Spread:
        """The spread of the bi-encoder's token similarities: shipped, from the cache, or measured now.

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """
        assert self.encoder is not None
        found = self.spreads.get(id(self.encoder))
        if found is None:
            found = self.spreads[id(self.encoder)] = spread_of(self.encoder, self.caches[id(self.encoder)].store)
        return found

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
        """Where vectors are kept: "disk", "memory", or "none" if no model makes vectors."""
        cache = next(iter(self.caches.values()), None)
        return "none" if cache is None else "memory" if cache.folder is None else "disk"

    def trim(self) -> None:
        """Shrinks the caches to their bounds. Call it only when no vectors are about to be gathered."""
        for cache in self.caches.values():
            cache.trim()

    def refresh(self) -> None:
        """Picks up vectors that other processes have added to the caches' folders."""
        for cache in self.caches.values():
            cache.refresh()

    def encode(self, texts: Sequence[str], max_tokens: int, detail: Detail, progress: ProgressCallback) -> None:
        """Encodes the documents whose vectors the caches lack.

        Args:
            texts: any strings.
            max_tokens: tokens kept of each text, special ones not counted.
            detail: the most detailed vectors that are wanted of a document.
            progress: as cache.vectors.ensure takes it.
        """
        for encoder, own in self._makers(detail):
            ensure(encoder, self.caches[id(encoder)], texts, max_tokens=max_tokens, detail=own, progress=progress, keep=False)

    def lacks(self, texts: Sequence[str], max_tokens: int, detail: Detail) -> list[bool]:
        """For each text, whether `encode` would have to encode it."""
        makers = [(self.caches[id(encoder)], own, min(max_tokens, encoder.limit)) for encoder, own in self._makers(detail)]
        return [not all(cache.has(text_key(text, limit), own) for cache, own, limit in makers) for text in texts]

    def _makers(self, detail: Detail) -> Iterator[tuple[Encoder, Detail]]:
        """Each encoder with the detail it has to make. If the scorer brings its own encoder, only that one makes more than token vectors."""
        needs = None if self.cross is None else self.cross.needs
        other = needs if needs is not None and needs.encoder is not self.encoder else None
        if self.encoder is not None and (self.encoder.pools or detail):
            yield self.encoder, detail if other is None else min(detail, Detail.TOKENS)
        if other is not None and detail >= other.detail:
            yield other.encoder, other.detail


def fingerprints(encoder: Encoder | None, cross: Scorer | None, arithmetic: str, spread: Spread | None) -> dict[str, str | None]:
    """Identifies models in results: each one's name, hash, settings of its folder that differ from the defaults, and spread, if a method needs it."""
    found: dict[str, str | None] = {
        "model": None if encoder is None else encoder.name,
        "model_vectors": None if encoder is None else encoder.key(),
        "model_cross": None if cross is None else cross.name,
        "model_cross_files": None if cross is None else cross.fingerprint,
        "arithmetic": arithmetic,
    }
    for role, model in (("model_reading", encoder), ("model_cross_reading", cross)):
        if model is not None and (reading := model.reading()):
            found[role] = reading
    return found if spread is None else found | {"model_spread": spread.write()}


def spread_in(models: Mapping[str, str | None]) -> Spread | None:
    """The spread in what `fingerprints` has made; None: no method needed it.

    Raises:
        ValueError: it does not read back.
    """
    found = models.get("model_spread")
    return None if found is None else Spread.read(found)


class Engines:
    """The engines that were used last, by their specs.

    Args:
        most: how many engines stay loaded.
    """

    def __init__(self, most: int = 2):
        self.most = most
        self.loaded: OrderedDict[EngineSpec, Engine] = OrderedDict()

    def get(self, spec: EngineSpec) -> Engine:
        """The engine of this spec. It is loaded unless it already is.

        Raises:
            UserError: as EngineSpec.load.
        """
        self.loaded[spec] = self.loaded.pop(spec) if spec in self.loaded else spec.load()
        while len(self.loaded) > self.most:
            self.loaded.popitem(last=False)
        return self.loaded[spec]


def pickled(value: Any, **changes: str | int | None) -> bytes:
    """Pickles a value; its engines are replaced by their specs.

    Args:
        value: a Reranker, or an object that holds one.
        changes: fields of the EngineSpecs that are different in the other process.

    Raises:
        TypeError: an engine's models were not loaded by name.
    """
    buffer = io.BytesIO()
    _Packing(buffer, changes).dump(value)
    return buffer.getvalue()


def unpickled(content: bytes, engines: Engines) -> Any:
    """Restores a value from `pickled`.

    Args:
        content: the bytes.
        engines: where the engines come from.

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
        value.__reduce__()  # raises if it has no spec
        assert value.spec is not None
        return replace(value.spec, **self.changes)  # type: ignore[arg-type]


class _Unpacking(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, engines: Engines):
        super().__init__(file)
        self.engines = engines

    def persistent_load(self, spec: EngineSpec) -> Engine:
        return self.engines.get(spec)


def encoders(encoder: Encoder | None, cross: Scorer | None) -> list[Encoder]:
    """The encoders that encode documents for these models, each once."""
    needed = None if cross is None or cross.needs is None else cross.needs.encoder
    return list({id(one): one for one in (encoder, needed) if one is not None}.values())


def new_caches(encoder: Encoder | None, cross: Scorer | None, folder: str | None = None, disk_bytes: int = DISK_BYTES) -> dict[int, VectorCache]:
    """A cache for each encoder of these models, by id() of the encoder.

    Args:
        encoder, cross: the models.
        folder: folder or URL of the vectors; None: the caches are in memory and empty.
        disk_bytes: upper bound on one model's vectors in the folder.
    """
    return {id(one): VectorCache(one.key(), folder, disk_bytes=disk_bytes, about=one.about()) for one in encoders(encoder, cross)}
