"""brief: an example of a new method in one file. It adds a preference for short documents to the cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerank_kernels import zscore
from rerank_lab.methods import Method, Pool, setting
from rerank_lab.models.base import Detail


@dataclass(frozen=True)
class Brief(Method):
    """Over the stage1_top_k documents of largest cosine, with n_k the words of document k; shown as its sigmoid:

    score_k = z(cos_k) − brevity z(log(1 + n_k))  [+ z(logit_k), where a cross-encoder is given]
    """

    name: ClassVar[str] = "brief"
    about: ClassVar[str] = "cosine keeps stage1_top_k, short ones of those come first"
    optional_cross: ClassVar[bool] = True
    about_cross: ClassVar[str] = "brief, with the cross-encoder's logit in its sum"
    stage1_top_k: int = setting(100, "documents that stage 1 keeps")
    brevity: float = setting(0.5, "weight of a document's shortness; below 0, of its length", least=-10.0, most=10.0)

    def score(self, pool: Pool) -> Tensor:
        cosine, kept = pool.nearest(pool.query_vectors(detail=Detail.POOLED), pool.vectors(detail=Detail.POOLED), self.stage1_top_k)
        words = torch.tensor([len(pool.documents[i].split()) for i in kept.tolist()], dtype=torch.float32, device="cpu")
        scores = zscore(cosine[kept].cpu()) - self.brevity * zscore(words.log1p())
        return pool.scatter(kept, scores if pool.cross is None else scores + zscore(pool.logits(kept).cpu()))
