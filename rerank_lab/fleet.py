"""Several models, each loaded once, and a Reranker for any two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rerank_lab.errors import UserError
from rerank_lab.methods import METHODS, Method
from rerank_lab.models import DEFAULT_CROSS, DEFAULT_MODEL, backbone_of, load_bi_encoder, load_cross_encoder
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.cache import MEMORY_BYTES, VectorCache
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.one_way import OneWayCrossEncoder
from rerank_lab.reranker import Reranker

TEXTS = ["Merge two tables on a key.", "Sort by the values along either axis. " * 40, ""]


@dataclass(frozen=True)
class Fleet:
    """Models by the names that they were asked for by, and one cache in memory for each that makes vectors.

    Attributes:
        encoders, crosses: by name.
        caches: by id() of the bi-encoder.
    """

    encoders: dict[str, BiEncoder]
    crosses: dict[str, CrossEncoder | OneWayCrossEncoder]
    caches: dict[int, VectorCache]

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
    ) -> Fleet:
        """Loads bi-encoders and cross-encoders by registry id, folder or hub name; a one-way cross-encoder shares its bi-encoder's weights.

        Args:
            subspace: of the first bi-encoder.
            device, runtime, precision: as Reranker takes them.
            cache_bytes: bound on all caches together.

        Raises:
            UserError: a model that is not to be found, or has another role.
        """
        place = {"device": device, "runtime": runtime, "precision": precision}
        encoders = {name: load_bi_encoder(name, subspace=subspace if n == 0 else None, **place) for n, name in enumerate(models)}
        readers = {name: load_cross_encoder(name, encoder=encoders.get(backbone_of(name) or ""), **place) for name in crosses}
        making = {id(e): e for e in [*encoders.values(), *(c.encoder for c in readers.values() if isinstance(c, OneWayCrossEncoder))]}
        bound = cache_bytes // max(1, len(making))
        return cls(encoders, readers, {key: VectorCache(e.key(), memory_bytes=bound) for key, e in making.items()})

    def reranker(self, method: str | Method, model: str | None, cross: str | None, *, max_tokens_per_doc: int = 512) -> Reranker:
        """Two of the models under a method; a name that the method has no use for may be None."""
        reader = None if cross is None else self.crosses[cross]
        ready = Reranker(None if model is None else self.encoders[model], method, reader, max_tokens_per_doc=max_tokens_per_doc)
        ready.cache = None if ready.encoder is None else self.caches[id(ready.encoder)]
        ready.cross_cache = self.caches[id(reader.encoder)] if isinstance(reader, OneWayCrossEncoder) else None
        return ready

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(iter([*self.encoders.values(), *self.crosses.values()])).device

    def warm(self) -> None:
        """Runs every model once through every method that it serves, so that no request pays for what happens once."""
        for method, kind in METHODS.items():
            models: Sequence[str | None] = list(self.encoders) if "bi-encoder" in kind.roles else [None]
            for model in models:
                for cross in list(self.crosses) if "cross-encoder" in kind.roles else [None]:
                    self.reranker(method, model, cross).without_cache().score("dot product", TEXTS)


__all__ = ["DEFAULT_CROSS", "DEFAULT_MODEL", "Fleet", "UserError"]
