"""late: an example of a new scorer that reads cached token vectors, in one file. It is MaxSim over the tokens of a bi-encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerank_kernels import subspace_attention
from rerank_lab.models.base import Detail, Encoder, Inputs, Needs, WorkItem
from rerank_lab.models.kinds import ScorerKind, load_bi_encoder
from rerank_lab.models.registry import DEFAULT_MODEL, Placement, Source


@dataclass(frozen=True, eq=False)
class Interaction(WorkItem):
    """A query with all its documents."""

    inputs: Inputs


class Late:
    """logit = mean over the query's tokens i of max_j x_i · x_kj, of a document without tokens −1.

    Args:
        encoder: makes the token vectors x.
    """

    name, fingerprint, shares = "late", "late 1", False
    notes: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder):
        self.encoder, self.device, self.limit = encoder, encoder.device, encoder.limit
        self.runtime, self.precision, self.needs = encoder.runtime, encoder.precision, Needs(encoder, Detail.TOKENS)

    def reading(self) -> str:
        """Nothing beyond a plain reading."""
        return ""

    def work(self, inputs: Inputs) -> list[Interaction]:
        """One item: all documents at once."""
        assert inputs.vectors is not None
        return [Interaction(range(len(inputs.texts)), len(inputs.vectors.tokens), False, inputs)]

    def logits(self, work: Sequence[WorkItem]) -> Tensor:
        """One logit a document."""
        return torch.cat([self._scores(item.inputs) for item in work if isinstance(item, Interaction)])

    def _scores(self, inputs: Inputs) -> Tensor:
        assert inputs.encoded_query is not None and inputs.vectors is not None
        query, documents = inputs.encoded_query.vectors, inputs.vectors
        places = torch.arange(len(documents.lengths), dtype=torch.int64, device="cpu")
        pairs = torch.stack([torch.zeros_like(places), places], 1)
        found = subspace_attention(query.tokens, query.offsets, documents.tokens, documents.offsets, pairs, 0.0)
        return found.view(len(places), len(query.tokens)).mean(1)

    def flops(self, work: Sequence[WorkItem]) -> int:
        """Products of token vectors: 2 · Lq · nnz · r."""
        every = [item.inputs for item in work if isinstance(item, Interaction)]
        return sum(2 * len(one.encoded_query.vectors.tokens) * one.vectors.tokens.numel() for one in every if one.encoded_query and one.vectors)


def load(source: Source, placement: Placement, loaded: Mapping[str, Encoder]) -> Late:
    """On the default bi-encoder, shared if it is loaded."""
    encoder = loaded.get(DEFAULT_MODEL)
    return Late(encoder or load_bi_encoder(DEFAULT_MODEL, device=placement.device, runtime=placement.runtime, precision=placement.precision))


KIND = ScorerKind(lambda source: source.name == "late", load, lambda name: (DEFAULT_MODEL, Detail.TOKENS))
