"""Where the work of an evaluation is done: in this process, or on a cluster (ray.py). What is done is the same code.

An executor places four kinds of work: texts to encode, a corpus to search, queries to rank, and a question to the models.
Texts are encoded in chunks of the corpus in its own order, whoever encodes them, so that rankings are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rerank_kernels import similarity_topk
from rerank_lab.datasets.corpus import Corpus
from rerank_lab.environment import Environment, describe
from rerank_lab.eval.kernel_check import types
from rerank_lab.eval.records import Cold, QueryCandidates, Record
from rerank_lab.eval.rows import Ranks
from rerank_lab.first_stage.base import QUERY_BATCH, TopK
from rerank_lab.first_stage.dense import merge_topk
from rerank_lab.models.base import Detail
from rerank_lab.reranker import CORPUS_BLOCK, Reranker
from rerank_lab.timing import reset_peak_memory


@dataclass(frozen=True)
class ModelFacts:
    """Models and the machine that runs them.

    Attributes:
        models: what identifies the models and their settings.
        environment: the machine, and who does the work.
        types: of number, that the chosen kernels read there.
    """

    models: dict[str, str | None]
    environment: Environment
    types: list[str]


class Executor(Protocol):
    """Who does the work. A corpus is id → text.

    Attributes:
        name: as results call it.
    """

    name: str

    def corpus(self) -> Corpus | None:
        """Where a collection's texts are put so that everybody who works reaches them; None: in memory."""

    def about(self, reranker: Reranker) -> ModelFacts:
        """`about` of the models where they run, and who runs them."""

    def encode(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], detail: Detail, title: str) -> None:
        """Puts the vectors of these documents into the cache, each distinct text's once."""

    def search(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], queries: Sequence[str], fetch: int) -> list[TopK]:
        """Values and places (in `ids`) of the `fetch` nearest of these documents by pooled vector, for each batch of QUERY_BATCH queries."""

    def rank(self, ranks: Ranks, queries: Sequence[QueryCandidates], corpus: Mapping[str, str]) -> Iterator[Record]:
        """A record a query, in any order."""

    def cold(self, label: str, ranks: Ranks, queries: Sequence[QueryCandidates], corpus: Mapping[str, str], about: Mapping[str, str]) -> Cold:
        """rows.cold."""

    def close(self) -> None:
        """Leaves nothing running."""


def about(reranker: Reranker) -> ModelFacts:
    """What results keep of models and machine, and the types of number that kernels read there; asked where the models are.

    Raises:
        ValueError: the chosen kernels do not run there.
    """
    machine = vars(describe(reranker.device))
    environment = Environment(**machine, vector_cache=reranker.cache_state, peak_memory_per_method=reset_peak_memory())
    return ModelFacts(reranker.fingerprints(), environment, types(reranker.device))


def query_batches(reranker: Reranker, queries: Sequence[str]) -> list[torch.Tensor]:
    """Pooled vectors of queries, QUERY_BATCH × d each but the last."""
    return [reranker.pooled(queries[start : start + QUERY_BATCH], kind="query") for start in range(0, len(queries), QUERY_BATCH)]


def search_block(batches: Iterable[torch.Tensor], block: torch.Tensor, fetch: int, metric: str = "cosine") -> list[TopK]:
    """The nearest of a block of documents (N × d) for each batch of queries."""
    return [similarity_topk(vectors, block, min(fetch, len(block)), metric=metric) for vectors in batches]


def merged(blocks: Iterable[list[TopK]], fetch: int, size: int = CORPUS_BLOCK) -> list[TopK]:
    """What the blocks of a corpus gave, in order, `size` documents each but the last, as the nearest of all."""
    found: list[TopK] = []
    for n, parts in enumerate(blocks):
        moved = [(values, places + n * size) for values, places in parts]
        found = [merge_topk(before, later, fetch) for before, later in zip(found, moved)] if n else moved
    return found
