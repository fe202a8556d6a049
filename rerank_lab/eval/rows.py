"""One row of the table while it is made: a record for each query, and the cost when every document is new."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

from rerank_lab.cache.places import TIMINGS
from rerank_lab.cache.store import Store
from rerank_lab.client.endpoint import Endpoint
from rerank_lab.datasets.dataset import Dataset
from rerank_lab.environment import describe
from rerank_lab.eval.records import ColdCost, Cost, QueryCandidates, Record
from rerank_lab.first_stage.candidates import Candidates
from rerank_lab.reranker import Ranking, Reranker
from rerank_lab.timing import peak_memory_mb, reset_peak_memory

log = logging.getLogger("rerank_lab")
WARM_UP = 2


class Ranker(Protocol):
    """Anything that ranks the texts of a query: a Reranker, an Endpoint, or a wrapper of one."""

    def score(self, query: str, texts: Sequence[str], *, first_stage: Sequence[float] | None = None) -> Ranking: ...


def queries_of(dataset: Dataset, candidates: Candidates) -> list[QueryCandidates]:
    """All queries that have candidates, in the order of the candidates."""
    return [QueryCandidates(q, dataset.queries[q], ranked) for q, ranked in candidates.run.items()]


def rank(ranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str], warm_up: int) -> Iterator[Record]:
    """Ranks queries one after another and yields a record for each.

    Args:
        ranker: ranks one query.
        queries: in the order in which they are ranked.
        corpus: id → text, of all candidates at least.
        warm_up: this many queries are ranked once before timing begins, so that the first time is like the others.
    """
    reset_peak_memory()
    for query in queries[:warm_up]:
        _rank(ranker, query, corpus)
    for query in queries:
        start = time.perf_counter()
        ranking = _rank(ranker, query, corpus)
        yield _record(query, ranking, time.perf_counter() - start, known=not isinstance(ranker, Endpoint))


def cold(
    label: str, reranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str], about: Mapping[str, str], cache: Store | None
) -> ColdCost:  # fmt: skip
    """Measures the cost of ranking queries when every document is new.

    The timings are stored beside the vectors. They are measured again only if something that they depend on has changed.

    Args:
        label, reranker: the row.
        queries, corpus: as for `rank`.
        about: what the timings depend on besides models, queries and machine.
        cache: where the timings are stored; None: nowhere.
    """
    if not isinstance(reranker, Reranker):
        return ColdCost(measured="unknown: what a server has seen before, it alone knows")
    if not reranker.uses_cache:
        return ColdCost(measured="no vectors are cached for this method: each run is new")
    if not queries:
        return ColdCost()
    depends = [label, reranker.settings, reranker.fuse_first_stage, reranker.token_limit, reranker.fingerprints()]
    key = _digest([*depends, about, [q.id for q in queries], vars(describe(reranker.device))])
    store, name = None if cache is None else cache.child(TIMINGS), f"{key}.json"
    try:
        if store is not None and name in store.names():
            return ColdCost.read(store.fetch(name).read_text(encoding="utf-8"), len(queries))
    except (OSError, ValueError, TypeError):
        log.warning("timings: %s/%s does not read back; measured again", store and store.shown, name)
    found = ColdCost()
    reset_peak_memory()
    for query in bar(queries, f"{label}, documents new"):
        start = time.perf_counter()
        ranking = _rank(reranker.without_cache(), query, corpus)
        found.seconds.append(time.perf_counter() - start)
        found.phases.append(ranking.seconds)
        found.documents += len(query.candidates.documents)
    found.peak_rss_mb, found.measured = peak_memory_mb(), f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    if store is not None:
        try:
            store.write(name, found.write())
        except OSError as error:
            log.warning("timings: %s/%s cannot be written (%s)", store.shown, name, error.strerror)
    return found


def _rank(ranker: Ranker, query: QueryCandidates, corpus: Mapping[str, str]) -> Ranking:
    return ranker.score(query.text, [corpus[d] for d in query.candidates.documents], first_stage=query.candidates.scores.tolist())


def _record(query: QueryCandidates, ranking: Ranking, seconds: float, *, known: bool) -> Record:
    """The record of one query; known: whether its cost is known besides the time."""
    documents = query.candidates.documents
    return Record(
        query=query.id,
        documents=[documents[i] for i in ranking.order],
        scores=ranking.scores.tolist(),
        relevance=ranking.relevance.tolist(),
        candidates=len(documents),
        seconds=seconds,
        cost=Cost(ranking.seconds, ranking.flops.seen, ranking.flops.new, ranking.truncated, peak_memory_mb()) if known else None,
    )


def _digest(value: Any) -> str:
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def bar(items: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
    """Shows a progress bar on a terminal. A bar inside another one disappears when it is done."""
    shown: Iterable[Any] = tqdm(items, desc=title, total=total, disable=None, leave=None)
    return shown


@contextmanager
def document_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (documents done, total) that moves a progress bar. The bar appears with the first call: never, if there is nothing to do."""
    shown: list[tqdm[Any]] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, desc=title, unit="doc", disable=None, leave=None))
        shown[0].update(done)

    try:
        yield progress
    finally:
        for one in shown:
            one.close()
