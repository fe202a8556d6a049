"""This process as an executor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rerank_lab.cache.store import Store
from rerank_lab.datasets.corpus import Corpus
from rerank_lab.eval.executors.base import ModelFacts, about, merged, query_batches, search_block
from rerank_lab.eval.records import ColdCost, QueryCandidates, Record
from rerank_lab.eval.rows import WARM_UP, Ranker, bar, cold, document_progress, rank
from rerank_lab.first_stage.base import TopK
from rerank_lab.models.base import Detail
from rerank_lab.reranker import Reranker


class LocalExecutor:
    """Does the work in this process.

    Args:
        cache: where timings are kept, beside the vectors; None: nowhere.
    """

    name = "local"

    def __init__(self, cache: Store | None = None):
        self.cache = cache

    def corpus(self) -> Corpus | None:
        return None

    def about(self, reranker: Reranker) -> ModelFacts:
        return about(reranker)

    def encode(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], detail: Detail, title: str) -> None:
        with document_progress(title) as progress:
            reranker.encode([corpus[i] for i in ids], detail=detail, progress=progress)

    def search(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], queries: Sequence[str], fetch: int) -> list[TopK]:
        batches = query_batches(reranker, queries)
        with document_progress("encode corpus") as progress:
            blocks = reranker.pooled_blocks([corpus[i] for i in ids], progress=progress)
            return merged((search_block(bar(batches, "dense retrieval"), block, fetch, reranker.similarity) for block in blocks), fetch)

    def rank(self, ranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str]) -> Iterator[Record]:
        return rank(ranker, queries, corpus, WARM_UP)

    def cold(self, label: str, ranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str], about: Mapping[str, str]) -> ColdCost:
        return cold(label, ranker, queries, corpus, about, self.cache)

    def close(self) -> None:
        pass
