"""best: subspace attention of the query's tokens over the documents' token vectors, contrasted over the pool."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerank_kernels import MIN_TAU, contrast_score
from rerank_lab.methods.method import Method, setting
from rerank_lab.methods.pool import Pool
from rerank_lab.methods.spread import COLLECTION, SPLIT, TEXTS, Spread, known
from rerank_lab.models.base import Detail, Origin, Vectors

AUTO = "auto"
MOST_LENGTH = 100.0
SPREAD_IN_TAUS = 5.0  # tau=auto is the model's spread over so many


@dataclass(frozen=True)
class Best(Method):
    """Over the stage1_top_k documents of largest cosine, with unit token vectors x on the model's subspace:

        A_ik  = Σ_j exp((s_ij − 1)/tau) s_ij / Σ_j exp((s_ij − 1)/tau),  s_ij = x_i · x_kj   (tau = 0: max_j s_ij)
        w_i   = max_k A_ik − mean_k A_ik                                     (uniform where they sum to 0)
        a_k   = Σ_i w_i A_ik / Σ_i w_i
        b     = z(z(cos) + alpha z(a) + length ln(1 + Ld) [+ lexical z(bm25)] [+ cross_weight z(logit), where a cross-encoder is given])
        score = b + gamma z(e_k · f),  f = Σ_k softmax(b / 0.3)_k e_k

    tau = auto is the spread of the model's token similarities over SPREAD_IN_TAUS, and at least MIN_TAU, the smallest above 0 that the
    kernels take. The spread is a property of the model, measured once on a fixed text (methods/spread.py).

    The length term is not brought to a deviation of 1: where lengths are alike it counts for little.

    w, z and f depend on the whole pool: a score ranks within one request and is not a calibrated probability. Shown as its sigmoid.

    A late-interaction model has no cosine. Stage 1 then keeps the first documents as they came in, and b = z(alpha z(a) + length ln(1 + Ld) [+ …]).
    """

    name: ClassVar[str] = "best"
    about: ClassVar[str] = "cosine keeps stage1_top_k, subspace attention orders those"
    tokens: ClassVar[bool] = True
    optional_cross: ClassVar[bool] = True
    about_cross: ClassVar[str] = "best, with the cross-encoder's logit in its sum"
    stage1_top_k: int = setting(100, "documents that stage 1 keeps")
    tau: float | str = setting(
        AUTO, f"temperature: auto, which is the model's spread / {SPREAD_IN_TAUS:g}, or a number, 0 or at least {MIN_TAU:g}", words=(AUTO,)
    )
    alpha: float = setting(2.0, "weight of the token term")
    length: float = setting(0.2, "weight of ln(1 + tokens of the document)", least=-MOST_LENGTH, most=MOST_LENGTH)
    gamma: float = setting(0.0, "weight of the feedback term")
    lexical: float = setting(0.0, "weight of BM25 among the candidates; 0.25 is worth a try where exact names matter")
    cross_weight: float = setting(2.0, "weight of the cross-encoder's logit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tau, str) and 0 < self.tau < MIN_TAU:
            raise ValueError(f"best: tau must be 0 (MaxSim) or at least {MIN_TAU}, not {self.tau}; auto chooses one for the model")

    def needs_pooled(self) -> str | None:
        return "best: gamma weighs feedback from vectors of whole texts" if self.gamma else None

    def needs_spread(self) -> bool:
        return self.tau == AUTO

    def in_use(self, spread: Spread | None) -> dict[str, float]:
        return {} if spread is None or not self.needs_spread() else {"tau": self.temperature(spread)}

    def temperature(self, spread: Spread | None) -> float:
        """tau as a number. `spread` is the model's; a tau that is a number needs none."""
        if not isinstance(self.tau, str):
            return self.tau
        assert spread is not None
        return max(MIN_TAU, spread.value / SPREAD_IN_TAUS)

    def by_length(self, documents: Vectors) -> tuple[Tensor, float]:
        """ln(1 + Ld) of K documents (K, fp32), and the weight of its z-score that makes it the length term, up to a constant."""
        logs = documents.offsets.diff().to(torch.float32).log1p()
        return math.copysign(1.0, self.length) * logs, abs(self.length) * float(logs.std(correction=0))

    def score(self, pool: Pool) -> Tensor:
        query = pool.query_vectors(detail=Detail.TOKENS)
        cosine, kept = pool.stage1(self.stage1_top_k)
        documents = pool.vectors(kept, detail=Detail.TOKENS)
        terms = [(pool.lexical(kept).to(cosine.device), self.lexical)] if self.lexical else []
        if pool.cross is not None and self.cross_weight:
            terms.append((pool.logits(kept).to(cosine.device), self.cross_weight))
        if self.length:
            terms.append(self.by_length(documents))
        with pool.clock.phase("score"):
            count, length = len(kept), len(query.tokens)
            places = torch.arange(count + 1, dtype=torch.int64, device=cosine.device)
            scores = contrast_score(
                pool.attention(query, documents, self.temperature(pool.spread)),
                places * length,
                places[[0, -1]],
                cosine[kept],
                alpha=self.alpha,
                terms=terms,
                gamma=self.gamma,
                embeddings=documents.pooled if self.gamma else None,
            )
        return pool.scatter(kept, scores)


def told(origin: Origin, cache: str | None, precision: str) -> str:
    """What `--list MODEL` says of a model's spread and of tau = auto on it. Arguments as for spread.known."""
    found = known(origin, cache, precision)
    if found is None:
        return f"measured at first use, on {TEXTS} {SPLIT} queries of {COLLECTION} and their documents; tau=auto is it / {SPREAD_IN_TAUS:g}"
    return f"{found} ({found.source}); tau=auto is {Best().temperature(found):.4g}"
