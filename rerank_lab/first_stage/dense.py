"""Candidates by the bi-encoder's pooled vectors, over all documents by brute force."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from rerank_lab.datasets.corpus import digests
from rerank_lab.datasets.runs import Ranked, Run
from rerank_lab.files import Json
from rerank_lab.first_stage.base import QUERY_BATCH, Context, TopK


class DenseStage:
    """The nearest documents, in corpus order where scores are equal."""

    def __init__(self, context: Context, argument: str):
        self.context, self.notes = context, list[str]()

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """As FirstStage.search."""
        corpus, run = self.context.dataset.corpus, Run()
        # Each distinct text once: rounding differs by a row's place in a matrix product, and equal texts must tie.
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
        return {}  # the models stand elsewhere in the results


def better(before: TopK, later: TopK, k: int) -> TopK:
    """The best k of two blocks' values and places, B × … each, never rising; of equal ones those of the earlier block stand first."""
    values, places = (torch.cat(pair, 1) for pair in zip(before, later))
    kept = torch.sort(values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, kept), places.gather(1, kept)
