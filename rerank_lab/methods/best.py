"""best: subspace attention of the query's tokens over the documents' token vectors, contrasted over the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerank_kernels import MIN_TAU, contrast_score
from rerank_lab.methods.method import Method, setting
from rerank_lab.methods.pool import Pool
from rerank_lab.models.base import Detail


@dataclass(frozen=True)
class Best(Method):
    """Over the stage1_top_k documents of largest cosine, with unit token vectors x on the model's subspace:

        A_ik  = Σ_j exp((s_ij − 1)/tau) s_ij / Σ_j exp((s_ij − 1)/tau),  s_ij = x_i · x_kj   (tau = 0: max_j s_ij)
        w_i   = max_k A_ik − mean_k A_ik                                     (uniform where they sum to 0)
        a_k   = Σ_i w_i A_ik / Σ_i w_i
        b     = z(z(cos) + alpha z(a) [+ lexical z(bm25)] [+ cross_weight z(logit), where a cross-encoder is given])
        score = b + gamma z(e_k · f),  f = Σ_k softmax(b / 0.3)_k e_k

    w, z and f depend on the whole pool: a score ranks within one request and is not a calibrated probability. Shown as its sigmoid.

    A late-interaction model has no cosine. Stage 1 then keeps the first documents as they came in, and b = z(alpha z(a) [+ …]).
    """

    name: ClassVar[str] = "best"
    about: ClassVar[str] = "cosine keeps stage1_top_k, subspace attention orders those"
    tokens: ClassVar[bool] = True
    optional_cross: ClassVar[bool] = True
    about_cross: ClassVar[str] = "best, with the cross-encoder's logit in its sum"
    stage1_top_k: int = setting(100, "documents that stage 1 keeps")
    tau: float = setting(0.1, "temperature; 0 or at least 0.013, below which exp leaves fp32's range")
    alpha: float = setting(2.0, "weight of the token term")
    gamma: float = setting(0.0, "weight of the feedback term")
    lexical: float = setting(0.0, "weight of BM25 among the candidates; 0.25 is worth a try where exact names matter")
    cross_weight: float = setting(3.0, "weight of the cross-encoder's logit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.tau < MIN_TAU:
            raise ValueError(f"best: tau must be 0 (MaxSim) or at least {MIN_TAU}, not {self.tau}")

    def needs_pooled(self) -> str | None:
        return "best: gamma weighs feedback from vectors of whole texts" if self.gamma else None

    def score(self, pool: Pool) -> Tensor:
        query = pool.query_vectors(detail=Detail.TOKENS)
        cosine, kept = pool.stage1(self.stage1_top_k)
        documents = pool.vectors(kept, detail=Detail.TOKENS)
        terms = [(pool.lexical(kept).to(cosine.device), self.lexical)] if self.lexical else []
        if pool.cross is not None and self.cross_weight:
            terms.append((pool.logits(kept).to(cosine.device), self.cross_weight))
        with pool.clock.phase("score"):
            count, length = len(kept), len(query.tokens)
            places = torch.arange(count + 1, dtype=torch.int64, device=cosine.device)
            scores = contrast_score(
                pool.attention(query, documents, self.tau),
                places * length,
                places[[0, -1]],
                cosine[kept],
                alpha=self.alpha,
                terms=terms,
                gamma=self.gamma,
                embeddings=documents.pooled if self.gamma else None,
            )
        return pool.scatter(kept, scores)
