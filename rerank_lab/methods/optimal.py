"""optimal: the bi-encoder keeps the likely documents, the cross-encoder reads those alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerank_kernels import zscore
from rerank_lab.methods.method import Method, setting
from rerank_lab.methods.pool import Pool
from rerank_lab.models.base import Detail


@dataclass(frozen=True)
class Optimal(Method):
    """Over the stage1_top_k documents of largest cosine: score_k = z(logit_k) + cosine_weight · z(cos_k), shown as its sigmoid.

    Held-out train queries of three collections chose a cosine_weight of 0 for minilm-cross (experiments/training/cross_encoder): the
    cosine keeps the candidates and the cross-encoder, which holds a cosine itself, orders them. Another may want more.
    """

    name: ClassVar[str] = "optimal"
    about: ClassVar[str] = "cosine keeps stage1_top_k, a cross-encoder orders those"
    roles: ClassVar[tuple[str, ...]] = ("bi-encoder", "cross-encoder")
    stage1_share: ClassVar[float | None] = 0.5
    stage1_top_k: int = setting(100, "documents that stage 1 keeps")
    cosine_weight: float = setting(0.0, "weight of the cosine beside the logit")

    def score(self, pool: Pool) -> Tensor:
        cosine, kept = pool.nearest(pool.query_vectors(detail=Detail.POOLED), pool.vectors(detail=Detail.POOLED), self.stage1_top_k)
        return pool.scatter(kept, zscore(pool.logits(kept)) + self.cosine_weight * zscore(cosine[kept].cpu()))
