"""The server's models, each loaded once, and a Reranker for any pair of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from rerank_lab.cache.vectors import MEMORY_BYTES, VectorCache
from rerank_lab.engine import Engine, encoders
from rerank_lab.errors import UserError
from rerank_lab.methods import METHODS, Method
from rerank_lab.methods.spread import Spread
from rerank_lab.models.base import AS_IT_IS, Encoder, Overrides, Scorer
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from rerank_lab.models.registry import DEFAULT_CROSS, DEFAULT_MODEL
from rerank_lab.reranker import Reranker

WARM_UP_TEXTS = ["Merge two tables on a key.", "Sort by the values along either axis. " * 40, ""]


@dataclass(frozen=True)
class Fleet:
    """Loaded models, with a cache in memory for each encoder.

    Attributes:
        encoders, crosses: name → model, under the names that were given.
        caches: id() of an encoder → its cache.
        engines: (name of an encoder, name of a cross-encoder) → their engine, filled on demand.
        spreads: as Engine's. `warm` fills it.
    """

    encoders: dict[str, Encoder]
    crosses: dict[str, Scorer]
    caches: dict[int, VectorCache]
    engines: dict[tuple[str | None, str | None], Engine] = field(default_factory=dict)
    spreads: dict[int, Spread] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        models: Sequence[str],
        crosses: Sequence[str],
        *,
        subspace: str | None = None,
        device: str = "auto",
        runtime: str = "auto",
        precision: str = "fp32",
        cache_bytes: int = MEMORY_BYTES,
        overrides: Mapping[str, Overrides] | None = None,
    ) -> Fleet:
        """Loads models. A one-way cross-encoder shares the weights of its bi-encoder.

        Args:
            models, crosses: bi-encoders and cross-encoders, by registry id, folder or hub name.
            subspace: file of the first bi-encoder's projection; None: the shipped one, or none.
            device, runtime, precision: as for Reranker.
            cache_bytes: bound on all caches together.
            overrides: name → prompts and instruction of that model in place of its folder's.

        Raises:
            UserError: a model cannot be found, or has another role.
        """
        load = partial(load_bi_encoder, device=device, runtime=runtime, precision=precision)
        load_cross = partial(load_cross_encoder, device=device, runtime=runtime, precision=precision)
        asked = overrides or {}
        loaded = {name: load(name, subspace=subspace if n == 0 else None, overrides=asked.get(name, AS_IT_IS)) for n, name in enumerate(models)}
        readers = {name: load_cross(name, encoder=loaded, overrides=asked.get(name, AS_IT_IS)) for name in crosses}
        making = {id(one): one for cross in (None, *readers.values()) for encoder in (None, *loaded.values()) for one in encoders(encoder, cross)}
        bound = cache_bytes // max(1, len(making))
        return cls(dict(loaded), readers, {key: VectorCache(one.key(), memory_bytes=bound) for key, one in making.items()})

    def reranker(self, method: str | Method, model: str | None, cross: str | None, *, max_tokens_per_doc: int = 512) -> Reranker:
        """A Reranker of two of the models under a method. The name of a model that the method does not use may be None."""
        engine = self.engines.get((model, cross))
        if engine is None:
            encoder, reader = None if model is None else self.encoders[model], None if cross is None else self.crosses[cross]
            caches = {id(one): self.caches[id(one)] for one in encoders(encoder, reader)}
            engine = self.engines[model, cross] = Engine(encoder, reader, caches, spreads=self.spreads)
        return Reranker.of(engine, method, max_tokens_per_doc=max_tokens_per_doc)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(iter([*self.encoders.values(), *self.crosses.values()])).device

    def warm(self) -> None:
        """Runs every method once with every model that it can run with, so that no request pays for one-time work."""
        for method, kind in METHODS.items():
            models: Sequence[str | None] = [None]
            if "bi-encoder" in kind.roles:
                models = [name for name, encoder in self.encoders.items() if kind().refusal(encoder.pools) is None]
            for model in models:
                for cross in list(self.crosses) if "cross-encoder" in kind.roles else [None]:
                    self.reranker(method, model, cross).without_cache().score("dot product", WARM_UP_TEXTS)


__all__ = ["DEFAULT_CROSS", "DEFAULT_MODEL", "Fleet", "UserError"]
