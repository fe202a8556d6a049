"""fast: cosine of the bi-encoder's pooled vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerank_lab.methods.method import Method
from rerank_lab.methods.pool import Pool
from rerank_lab.models.base import Detail


@dataclass(frozen=True)
class Fast(Method):
    """score_k = cos(q, e_k), every document; shown as it is, −1 to 1."""

    name: ClassVar[str] = "fast"
    about: ClassVar[str] = "cosine of pooled vectors"

    def score(self, pool: Pool) -> Tensor:
        return pool.nearest(pool.query_vectors(detail=Detail.POOLED), pool.vectors(detail=Detail.POOLED), len(pool))[0]

    def relevance(self, scores: Tensor) -> Tensor:
        return scores.double()
