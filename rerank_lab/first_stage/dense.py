"""Candidates by the bi-encoder's pooled vectors: an exact search over all documents."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from rerank_lab.datasets.corpus import digests
from rerank_lab.datasets.runs import Ranked, Run
from rerank_lab.files import Json
from rerank_lab.first_stage.base import QUERY_BATCH, Context, TopK


class DenseStage:
    """The documents nearest to the query. Equal scores are in corpus order."""

    def __init__(self, context: Context, argument: str):
        self.context, self.notes = context, list[str]()

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """As FirstStage.search."""
        corpus, run = self.context.dataset.corpus, Run()
        # Each distinct text is scored once: rounding depends on a row's position in a matrix product, and equal texts must tie.
        groups: dict[bytes | str, list[int]] = {}
        for i, text in enumerate(digests(corpus)):
            groups.setdefault(text, []).append(i)
        ids, repeats, order = list(corpus), list(groups.values()), list(queries)
        found = self.context.nearest([ids[own[0]] for own in repeats], list(queries.values()), k)
        for n, (values, places) in enumerate(found):
            for query, row, distinct in zip(order[n * QUERY_BATCH :], values.numpy(), places.tolist()):
                ranked = sorted((-score, i) for score, d in zip(row, distinct) for i in repeats[d])[:k]
                run[query] = Ranked([ids[i] for _, i in ranked], np.array([-score for score, _ in ranked], dtype=np.float32))
        return run

    def about(self) -> dict[str, Json]:
        """As FirstStage.about."""
        return {}  # results.json names the models elsewhere


def merge_topk(before: TopK, later: TopK, k: int) -> TopK:
    """Merges the TopK of two blocks of documents into the best k. On equal values the earlier block comes first.

    Args:
        before, later: values and positions, B × K₁ and B × K₂. Positions of the two blocks do not overlap.
        k: how many to keep.
    """
    values, places = (torch.cat(pair, 1) for pair in zip(before, later))
    kept = torch.sort(values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, kept), places.gather(1, kept)
