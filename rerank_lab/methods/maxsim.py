"""maxsim: the sum of each query token's largest similarity with a document's tokens, the score of ColBERT models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerank_lab.methods.method import Method, setting
from rerank_lab.methods.pool import Pool
from rerank_lab.models.base import Detail


@dataclass(frozen=True)
class MaxSim(Method):
    """Over the stage1_top_k documents of largest cosine: score_k = Σ_i max_j s_ij, with s_ij = x_i · x_kj of unit token vectors x.

    Shown as it is: at most the number of the query's tokens, and comparable only between documents of one query. A document
    without tokens has −1 for each of the query's. Under a late-interaction model, which has no cosine, stage 1 keeps the first
    documents as they came in. Source: Khattab and Zaharia, ColBERT (SIGIR 2020).
    """

    name: ClassVar[str] = "maxsim"
    about: ClassVar[str] = "cosine keeps stage1_top_k, the sum of each query token's best match orders those (ColBERT)"
    tokens: ClassVar[bool] = True
    stage1_top_k: int = setting(100, "documents that stage 1 keeps")

    def needs_pooled(self) -> str | None:
        return None

    def score(self, pool: Pool) -> Tensor:
        query = pool.query_vectors(detail=Detail.TOKENS)
        _, kept = pool.stage1(self.stage1_top_k)
        documents = pool.vectors(kept, detail=Detail.TOKENS)
        with pool.clock.phase("score"):
            scores = pool.attention(query, documents, 0.0).view(len(kept), len(query.tokens)).sum(1)
        return pool.scatter(kept, scores)

    def relevance(self, scores: Tensor) -> Tensor:
        return scores.double()
