"""overlap: an example of a new scorer in one file. It counts the words that query and document share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerank_lab.models.base import Encoder, Inputs, Needs, WorkItem
from rerank_lab.models.kinds import ScorerKind
from rerank_lab.models.registry import Placement, Source


@dataclass(frozen=True, eq=False)
class Words(WorkItem):
    """The words of a query and of one document."""

    query: frozenset[str]
    document: frozenset[str]


class Overlap:
    """logit = 4 · (share of the query's words that the document holds) − 2. Only the first 64 words of a document are read."""

    name, limit, runtime, precision, shares = "overlap", 64, "torch", "fp32", True
    device: ClassVar[torch.device] = torch.device("cpu")
    fingerprint = hashlib.sha256(b"overlap 1").hexdigest()
    needs: Needs | None = None
    notes: tuple[str, ...] = ()

    def reading(self) -> str:
        """Always "": it has no settings."""
        return ""

    def work(self, inputs: Inputs) -> list[Words]:
        """One work item for each document."""
        query, most = inputs.query.lower().split(), min(inputs.max_tokens, self.limit)
        found = []
        for place, text in enumerate(inputs.texts):
            words = text.lower().split()
            found.append(Words([place], len(query) + len(words[:most]), len(words) > most, frozenset(query), frozenset(words[:most])))
        return found

    def logits(self, work: Sequence[WorkItem]) -> Tensor:
        """One logit for each document."""
        shares = [len(one.query & one.document) / len(one.query) for one in work if isinstance(one, Words)]
        return 4 * torch.tensor(shares, dtype=torch.float32, device="cpu") - 2

    def flops(self, work: Sequence[WorkItem]) -> int:
        """0: it multiplies no matrices."""
        return 0


def load(source: Source, place: Placement, loaded: Mapping[str, Encoder]) -> Overlap:
    """It has no weights."""
    return Overlap()


KIND = ScorerKind(lambda source: source.name == "overlap", load)
