"""One row of the table while it is made: every query's record, and what it costs with every document new."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

from rerank_lab.candidates import Candidates
from rerank_lab.datasets import Dataset
from rerank_lab.endpoint import Endpoint
from rerank_lab.environment import describe
from rerank_lab.journal import Journal
from rerank_lab.models.shards import default_folder
from rerank_lab.reranker import Ranking, Reranker
from rerank_lab.run import write_atomically
from rerank_lab.timing import peak_memory_mb, reset_peak_memory

log = logging.getLogger("rerank_lab")
WARM_UP = 2


class Ranks(Protocol):
    """What gives a Ranking of a query's texts: a Reranker, an Endpoint, or one under other settings."""

    def score(self, query: str, texts: Sequence[str], *, first_stage: Sequence[float] | None = None) -> Ranking: ...


def measure(
    label: str, reranker: Reranker | Endpoint, dataset: Dataset, candidates: Candidates, journal: Journal, options: argparse.Namespace
) -> dict[str, Any]:
    """Every query's record and the cold timings."""
    found = records(label, reranker, dataset, candidates, journal)
    return {"records": found, "token_limit": reranker.token_limit, "cold": _cold(label, reranker, dataset, candidates, options)}


def records(label: str, reranker: Ranks, dataset: Dataset, candidates: Candidates, journal: Journal) -> list[dict[str, Any]]:
    """Ranks every query that the journal lacks; gives all records."""
    found = journal.records(label)
    done = {r["query"] for r in found}
    left = [q for q in candidates.run if q not in done]
    reset_peak_memory()
    for q in left[:WARM_UP]:
        _rank(reranker, q, dataset, candidates)
    for q in bar(left, label):
        start = time.perf_counter()
        ranking = _rank(reranker, q, dataset, candidates)
        record = _record(q, ranking, candidates, time.perf_counter() - start, known=isinstance(reranker, Reranker))
        journal.append(label, record)
        found.append(record)
    return found


def _cold(label: str, reranker: Reranker | Endpoint, dataset: Dataset, candidates: Candidates, options: argparse.Namespace) -> dict[str, Any]:
    """Cost with every document new, over the first few queries; kept beside the vectors, since only a change can change it."""
    queries = list(candidates.run)[: options.cold_queries]
    cold: dict[str, Any] = {"seconds": [], "phases": [], "documents": 0, "peak_rss_mb": None, "measured": "not measured"}
    if isinstance(reranker, Endpoint):
        return cold | {"measured": "unknown: what a server has seen before, it alone knows"}
    if not reranker.caches:
        return cold | {"measured": "no vectors are cached for this method: each run is new"}
    if not queries:
        return cold
    depends = [label, reranker.method.settings(), reranker.fuse_first_stage, reranker.token_limit, reranker.fingerprints()]
    key = _digest([*depends, dataset.hash, candidates.about["hash"], queries, describe(reranker.device)])
    store = None if options.no_cache else (options.cache or default_folder()) / "timings" / f"{key}.json"
    try:
        if store is not None and store.is_file():
            kept: dict[str, Any] = json.loads(store.read_text(encoding="utf-8"))
            if kept.keys() == cold.keys() and len(kept["seconds"]) == len(kept["phases"]) == len(queries):
                return kept
            raise ValueError
    except (OSError, ValueError, AttributeError, TypeError):
        log.warning("timings: %s does not read back; measured again", store)
    reset_peak_memory()
    for q in bar(queries, f"{label}, documents new"):
        start = time.perf_counter()
        ranking = _rank(reranker.without_cache(), q, dataset, candidates)
        cold["seconds"].append(time.perf_counter() - start)
        cold["phases"].append(ranking.seconds)
        cold["documents"] += len(candidates.run[q].documents)
    cold |= {"peak_rss_mb": peak_memory_mb(), "measured": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"}
    if store is not None:
        try:
            write_atomically(store, json.dumps(cold))
        except OSError as error:
            log.warning("timings: %s cannot be written (%s)", store, error.strerror)
    return cold


def _rank(reranker: Ranks, q: str, dataset: Dataset, candidates: Candidates) -> Ranking:
    ranked = candidates.run[q]
    return reranker.score(dataset.queries[q], [dataset.corpus[d] for d in ranked.documents], first_stage=ranked.scores.tolist())


def _record(q: str, ranking: Ranking, candidates: Candidates, seconds: float, *, known: bool) -> dict[str, Any]:
    """One line of the journal; what a method cost besides time is null where it is not known."""
    documents = candidates.run[q].documents
    cost = {
        "phases": ranking.seconds,
        "flops": ranking.flops.seen,
        "flops_new": ranking.flops.new,
        "truncated": ranking.truncated,
        "peak_rss_mb": peak_memory_mb(),
    }
    return {
        "query": q,
        "documents": [documents[i] for i in ranking.order],
        "scores": ranking.scores.tolist(),
        "relevance": ranking.relevance.tolist(),
        "candidates": len(documents),
        "seconds": seconds,
    } | (cost if known else dict.fromkeys(cost))


def _digest(value: Any) -> str:
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    shown: Iterable[Any] = tqdm(items, desc=title, disable=None)
    return shown


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that learns its total from the first call, and never shows where there is nothing to do."""
    shown: list[tqdm[Any]] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, desc=title, unit="doc", disable=None))
        shown[0].update(done)

    try:
        yield progress
    finally:
        for one in shown:
            one.close()
