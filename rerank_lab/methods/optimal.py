"""optimal: the bi-encoder selects documents by cosine, and the cross-encoder reads only those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerank_kernels import zscore
from rerank_lab.methods.method import Method, setting
from rerank_lab.methods.pool import Pool


@dataclass(frozen=True)
class Optimal(Method):
    """Over the stage1_top_k documents of largest cosine: score_k = z(logit_k) + cosine_weight · z(cos_k), shown as its sigmoid.

    The default cosine_weight of 0 was chosen for minilm-cross on held-out train queries of three collections
    (experiments/training/cross_encoder). Its logit contains a cosine already. Other cross-encoders may need a higher weight.
    Under a late-interaction model, which has no cosine, stage 1 keeps the first documents as they came in.
    """

    name: ClassVar[str] = "optimal"
    about: ClassVar[str] = "cosine keeps stage1_top_k, a cross-encoder orders those"
    roles: ClassVar[tuple[str, ...]] = ("bi-encoder", "cross-encoder")
    stage1_share: ClassVar[float | None] = 0.5
    stage1_top_k: int = setting(100, "documents that stage 1 keeps")
    cosine_weight: float = setting(0.0, "weight of the cosine beside the logit")

    def needs_pooled(self) -> str | None:
        return "optimal: cosine_weight weighs the cosine of whole texts" if self.cosine_weight else None

    def score(self, pool: Pool) -> Tensor:
        cosine, kept = pool.stage1(self.stage1_top_k)
        return pool.scatter(kept, zscore(pool.logits(kept)) + self.cosine_weight * zscore(cosine[kept].cpu()))
