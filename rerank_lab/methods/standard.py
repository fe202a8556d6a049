"""standard: the cross-encoder reads every (query, document) pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerank_lab.methods.method import Method
from rerank_lab.methods.pool import Pool


@dataclass(frozen=True)
class Standard(Method):
    """score_k = logit(q, k), every document; shown as its sigmoid."""

    name: ClassVar[str] = "standard"
    about: ClassVar[str] = "a cross-encoder reads every pair"
    roles: ClassVar[tuple[str, ...]] = ("cross-encoder",)

    def score(self, pool: Pool) -> Tensor:
        return pool.logits(torch.arange(len(pool), dtype=torch.int64, device="cpu"))
