"""What the first stage hands over: candidates a query, hashed, with the recall and the ceiling they set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rerank_lab.datasets import Dataset
from rerank_lab.first_stage import Context, find
from rerank_lab.first_stage.base import Progress, TopK
from rerank_lab.run import Ranked, Run, order


@dataclass(frozen=True)
class Candidates:
    """First-stage results.

    Attributes:
        run: at most top_k documents a query, best first, with the first stage's scores; queries without any are absent.
        about: the source and its parameters, the hash (SHA-256 over query ids and document ids in order) and counts.
        notes: what a reader should know.
    """

    run: Run
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def cut(self, top_k: int) -> Candidates:
        """The best top_k a query, as the same first stage would have given them."""
        if top_k >= self.about["top_k"]:
            return self
        run = {q: Ranked(r.documents[:top_k], r.scores[:top_k]) for q, r in self.run.items()}
        return Candidates(run, self.about | _facts(run, top_k), self.notes)


def make_candidates(
    source: str,
    dataset: Dataset,
    top_k: int,
    *,
    search: Callable[[Sequence[str], Sequence[str], int], list[TopK]],
    drop_identical: bool,
    progress: Progress,
) -> Candidates:
    """Candidates for every query of a dataset.

    Args:
        source: a first stage as --candidates names it.
        dataset: the collection.
        top_k: candidates a query at most.
        search: Context.nearest.
        drop_identical: leave out the document whose id is the query's.
        progress: Context.progress.

    Raises:
        UserError: an unknown first stage, or what it says of its argument.
    """
    declared, argument = find(source)
    stage = declared.make(Context(dataset, search, progress), argument)
    queries = {q: text for q, text in dataset.queries.items() if text.strip()}
    run = stage.search(queries, top_k + 1 if drop_identical else top_k)
    about, notes = {"source": declared.name} | stage.about(), list(stage.notes)
    if drop_identical:
        run = {q: _without(r, q, top_k) for q, r in run.items()}
    run = {q: r for q, r in run.items() if r.documents}
    without = len(dataset.qrels) - len(run)
    if without:
        notes.append(f"{without} of {len(dataset.qrels)} judged queries have no candidates: they score 0 and count")
    return Candidates(run, about | {"drop_identical_ids": drop_identical, "queries_without": without} | _facts(run, top_k), notes)


def _facts(run: Run, top_k: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for q, r in run.items():
        digest.update(" ".join([q, *r.documents]).encode() + b"\n")  # no id holds either
    return {
        "top_k": top_k,
        "hash": digest.hexdigest(),
        "documents_per_query": float(np.mean([len(r.documents) for r in run.values()])) if run else 0.0,
    }


def oracle(run: Run, dataset: Dataset) -> Run:
    """The same candidates in the best order that judgements allow: the ceiling of any reranker."""
    best: Run = {}
    for q, ranked in run.items():
        grades = np.array([dataset.qrels[q].get(d, 0) for d in ranked.documents], dtype=np.float32)
        places = order(grades)
        best[q] = Ranked([ranked.documents[i] for i in places], grades[places])
    return best


def _without(ranked: Ranked, identifier: str, top_k: int) -> Ranked:
    kept = np.array([i for i, d in enumerate(ranked.documents) if d != identifier][:top_k], dtype=np.int64)
    return Ranked([ranked.documents[i] for i in kept], ranked.scores[kept])
