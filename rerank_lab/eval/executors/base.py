"""Where the work of an evaluation is done: in this process, or on a cluster (ray.py). The code that does it is the same.

An executor does four kinds of work: it encodes texts, searches a corpus, ranks queries, and asks the models for facts.
Every executor encodes the same chunks of texts, in the order of the corpus, so that rankings are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rerank_kernels import similarity_topk
from rerank_lab.datasets.corpus import Corpus
from rerank_lab.environment import Environment, describe
from rerank_lab.eval.kernel_check import supported_dtypes
from rerank_lab.eval.records import ColdCost, QueryCandidates, Record
from rerank_lab.eval.rows import Ranker
from rerank_lab.first_stage.base import QUERY_BATCH, TopK
from rerank_lab.first_stage.dense import merge_topk
from rerank_lab.models.base import Detail
from rerank_lab.reranker import CORPUS_BLOCK, Reranker
from rerank_lab.timing import reset_peak_memory


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the models and the machine that runs them.

    Attributes:
        models: names, hashes and settings that identify the models.
        environment: the machine, and the executor.
        dtypes: names of the dtypes that the chosen kernels read there.
    """

    models: dict[str, str | None]
    environment: Environment
    dtypes: list[str]


class Executor(Protocol):
    """Does the work of an evaluation. A corpus is id → text.

    Attributes:
        name: its name in results.
    """

    name: str

    def corpus(self) -> Corpus | None:
        """Where a collection's texts are put so that every worker can read them; None: in memory."""

    def about(self, reranker: Reranker) -> ModelFacts:
        """Facts about the models, from the machine that runs them."""

    def encode(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], detail: Detail, title: str) -> None:
        """Puts the vectors of these documents into the cache. Each distinct text is encoded once.

        Args:
            reranker: has the models.
            corpus, ids: the documents.
            detail: what to keep of each document.
            title: of the progress bar.
        """

    def search(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], queries: Sequence[str], fetch: int) -> list[TopK]:
        """Finds the nearest documents by pooled vector.

        Args:
            reranker: has the models.
            corpus, ids: the documents.
            queries: texts.
            fetch: how many documents to find for each query.

        Returns:
            for each batch of QUERY_BATCH queries, values and places in `ids`.
        """

    def rank(self, ranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str]) -> Iterator[Record]:
        """Ranks the queries. Yields one record for each, in any order."""

    def cold(self, label: str, ranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str], about: Mapping[str, str]) -> ColdCost:
        """Measures the cost when every document is new (see rows.cold)."""

    def close(self) -> None:
        """Ends everything that was started."""


def about(reranker: Reranker) -> ModelFacts:
    """Facts about these models and this machine. Call it on the machine that runs the models.

    Raises:
        ValueError: the chosen kernels do not run here.
    """
    machine = vars(describe(reranker.device))
    environment = Environment(**machine, vector_cache=reranker.cache_state, peak_memory_per_method=reset_peak_memory())
    return ModelFacts(reranker.fingerprints(), environment, supported_dtypes(reranker.device))


def query_batches(reranker: Reranker, queries: Sequence[str]) -> list[torch.Tensor]:
    """Pooled vectors of queries, in batches of QUERY_BATCH × d; the last batch may be smaller."""
    return [reranker.pooled(queries[start : start + QUERY_BATCH], kind="query") for start in range(0, len(queries), QUERY_BATCH)]


def search_block(batches: Iterable[torch.Tensor], block: torch.Tensor, fetch: int, metric: str = "cosine") -> list[TopK]:
    """For each batch of queries, the nearest documents of one block (N × d); places count from the block's start."""
    return [similarity_topk(vectors, block, min(fetch, len(block)), metric=metric) for vectors in batches]


def merged(blocks: Iterable[list[TopK]], fetch: int, size: int = CORPUS_BLOCK) -> list[TopK]:
    """Merges the nearest documents of each block into the nearest documents of the corpus.

    Args:
        blocks: results of `search_block` for each block, in order.
        fetch: how many documents to keep for each query.
        size: documents in a block; the last block may have fewer.
    """
    found: list[TopK] = []
    for n, parts in enumerate(blocks):
        moved = [(values, places + n * size) for values, places in parts]
        found = [merge_topk(before, later, fetch) for before, later in zip(found, moved)] if n else moved
    return found
