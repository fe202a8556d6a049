"""The candidates of an evaluation: made by a first stage, counted and hashed; and their best possible order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rerank_lab.datasets.dataset import Dataset
from rerank_lab.datasets.runs import Ranked, Run, order
from rerank_lab.errors import ModelError
from rerank_lab.files import Json
from rerank_lab.first_stage import Context, find
from rerank_lab.first_stage.base import ProgressBar, TopK

# Names that results use for the candidates of any first stage.
TAKEN = {"source", "top_k", "hash", "documents_per_query", "measures", "notes", "drop_identical_ids", "queries_without", "ceiling", "details"}


@dataclass(frozen=True)
class Candidates:
    """The candidates of all queries.

    Attributes:
        run: at most top_k documents for each query, best first, with the first stage's scores. Queries without candidates are absent.
        source: the first stage's name.
        top_k: upper bound on the candidates of a query.
        hash: SHA-256 over query ids and document ids in order.
        documents_per_query: mean number of candidates.
        details: further facts for results.json: parameters, files, counts.
        notes: what a reader of results should know.
    """

    run: Run
    source: str
    top_k: int
    hash: str
    documents_per_query: float
    details: dict[str, Json]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run, source: str, top_k: int, details: dict[str, Json], notes: list[str]) -> Candidates:
        """Makes Candidates of a run: counts and hashes it."""
        digest = hashlib.sha256()
        for q, r in run.items():
            digest.update(" ".join([q, *r.documents]).encode() + b"\n")  # no id holds either
        mean = float(np.mean([len(r.documents) for r in run.values()])) if run else 0.0
        return cls(run, source, top_k, digest.hexdigest(), mean, details, notes)

    def cut(self, top_k: int) -> Candidates:
        """The best top_k candidates of each query, as the first stage would have returned them for this top_k."""
        if top_k >= self.top_k:
            return self
        run = {q: Ranked(r.documents[:top_k], r.scores[:top_k]) for q, r in self.run.items()}
        return Candidates.of(run, self.source, top_k, self.details, self.notes)


def make_candidates(
    source: str,
    dataset: Dataset,
    top_k: int,
    *,
    search: Callable[[Sequence[str], Sequence[str], int], list[TopK]],
    drop_identical: bool,
    progress: ProgressBar,
    device: str = "auto",
) -> Candidates:
    """Finds candidates for every query of a dataset.

    Args:
        source: a first stage as --candidates names it.
        dataset: the collection.
        top_k: how many candidates to find for a query at most.
        search: becomes Context.nearest.
        drop_identical: whether to leave out the document whose id is the query's id.
        progress, device: become Context.progress and Context.device.

    Raises:
        UserError: the first stage is unknown or refuses its argument.
        ModelError: what it returns is not what FirstStage asks for.
    """
    declared, argument = find(source)
    stage = declared.make(Context(dataset, search, progress, device), argument)
    queries = {q: text for q, text in dataset.queries.items() if text.strip()}
    most = top_k + 1 if drop_identical else top_k
    run = stage.search(queries, most)
    details, notes = stage.about(), list(stage.notes)
    for problem in _broken(run, details, queries, dataset, most):
        raise ModelError(f"first stage {declared.name}: {problem}")
    if drop_identical:
        run = {q: _without(r, q, top_k) for q, r in run.items()}
    run = {q: r for q, r in run.items() if r.documents}
    without = len(dataset.qrels) - len(run)
    if without:
        notes.append(f"{without} of {len(dataset.qrels)} judged queries have no candidates: they score 0 and count")
    return Candidates.of(run, declared.name, top_k, details | {"drop_identical_ids": drop_identical, "queries_without": without}, notes)


def _broken(run: Run, details: dict[str, Json], queries: Mapping[str, str], dataset: Dataset, most: int) -> Iterator[str]:
    """What a first stage has returned that would make wrong figures."""
    for query, ranked in run.items():
        documents, scores = ranked.documents, np.asarray(ranked.scores)
        if query not in queries:
            yield f"it was not asked for the query {query!r}"
        if len(documents) > most or len(documents) != len(scores):
            yield f"query {query}: {len(documents)} documents with {len(scores)} scores, where {most} documents at most were asked for"
        if len(set(documents)) < len(documents):
            yield f"query {query}: a document stands there twice"
        if unknown := [document for document in documents if document not in dataset.corpus]:
            yield f"query {query}: the corpus has no document {unknown[0]!r}"
        if not np.isfinite(scores).all() or (np.diff(scores) > 0).any():
            yield f"query {query}: scores must be finite and never rise"
    if taken := [key for key in details if key in TAKEN or key.startswith(("recall@", "oracle_"))]:
        yield f"its `about` uses the name {taken[0]}, which results have already"
    try:
        json.dumps(details, allow_nan=False)
    except (TypeError, ValueError) as error:
        yield f"its `about` is not JSON ({error})"


def oracle(run: Run, dataset: Dataset) -> Run:
    """The same candidates in the best order that the judgements allow. No reranker of these candidates scores higher."""
    best: Run = {}
    for q, ranked in run.items():
        grades = np.array([dataset.qrels[q].get(d, 0) for d in ranked.documents], dtype=np.float32)
        places = order(grades)
        best[q] = Ranked([ranked.documents[i] for i in places], grades[places])
    return best


def _without(ranked: Ranked, identifier: str, top_k: int) -> Ranked:
    kept = np.array([i for i, d in enumerate(ranked.documents) if d != identifier][:top_k], dtype=np.int64)
    return Ranked([ranked.documents[i] for i in kept], ranked.scores[kept])
