"""A worker process on a cluster. It loads the models once, reads texts and vectors from the shared cache, and answers calls.

A call names its texts by a plan and a number. A plan is a file in the cache with positions of texts in the corpus, in order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from rerank_kernels import use_backend
from rerank_lab.cache.places import PLANS
from rerank_lab.cache.store import Store
from rerank_lab.cache.vectors import CHUNK
from rerank_lab.datasets.corpus import TextFiles
from rerank_lab.engine import Engines, unpickled
from rerank_lab.environment import describe
from rerank_lab.errors import ModelError, UserError
from rerank_lab.eval.executors.base import ModelFacts, about, query_batches, search_block
from rerank_lab.eval.records import ColdCost, QueryCandidates, Record
from rerank_lab.eval.rows import WARM_UP, Ranker, cold, rank
from rerank_lab.models.base import Detail
from rerank_lab.reranker import CORPUS_BLOCK, Reranker

QueryPositions = tuple[QueryCandidates, np.ndarray]  # a query, and the positions of its candidates' texts in the corpus


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told when it starts.

    Attributes:
        cache: the shared folder or URL.
        kernels, threads: as in the options.
    """

    cache: str
    kernels: str
    threads: int | None


@dataclass(frozen=True)
class Location:
    """Where a worker runs: Ray's id of the node, and a description of the machine."""

    node: str
    machine: str


class Worker:
    """A process that loads models once and keeps them for as long as it lives."""

    def __init__(self, setup: WorkerSetup):
        import ray

        self.setup, self.cache, self.cache_version, self.ranked = setup, Store(setup.cache), 0, b""
        self.engines = Engines()  # room for two: a row's models, and the same models in fp32
        self.texts: dict[TextFiles, TextFiles] = {}  # keeps the files of each open
        self.node: str = ray.get_runtime_context().get_node_id()
        if setup.threads:
            torch.set_num_threads(setup.threads)
        logging.getLogger("rerank_lab").setLevel(logging.ERROR)
        use_backend(setup.kernels).__enter__()

    def hello(self) -> Location:
        """Tells where the worker runs."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        machine = describe(device)
        return Location(self.node, f"{machine.cpu}, {machine.threads} threads, device {machine.device}")

    def call(self, work: str, packed_ranker: bytes, expected: dict[str, str | None] | None, cache_version: int, *arguments: Any) -> tuple[str, Any]:
        """Calls one of the functions in WORK.

        Args:
            work: its name.
            packed_ranker: the ranker, packed.
            expected: fingerprints that the models must have; None: any.
            cache_version: a new number means that the cache has new vectors, so that its index must be read again.
            arguments: of the function.

        Returns:
            ("done", the function's result) or ("failed", why the models do not load here).
        """
        try:
            ranker = opened(packed_ranker, expected, self.engines)
        except (UserError, ModelError, OSError, RuntimeError, ImportError) as error:
            return "failed", str(error) or type(error).__name__
        self.warm, self.ranked = packed_ranker == self.ranked, packed_ranker if work == "rank" else self.ranked
        if cache_version != self.cache_version:
            reranker_of(ranker).engine.refresh()
            self.cache_version = cache_version
        known = [self.texts.setdefault(a, a) if isinstance(a, TextFiles) else a for a in arguments]
        return "done", WORK[work](self, ranker, *known)


def opened(packed_ranker: bytes, expected: dict[str, str | None] | None, engines: Engines) -> Ranker:
    """Unpacks a ranker and loads its models.

    Raises:
        UserError: the models' fingerprints are not the expected ones, or models cannot be loaded.
    """
    ranker: Ranker = unpickled(packed_ranker, engines)
    found = reranker_of(ranker).fingerprints()
    differing = ", ".join(f"{k} {v} instead of {expected[k]}" for k, v in found.items() if v != expected[k] and v is not None) if expected else ""
    if differing:
        raise UserError(f"other models than on the node that began: {differing}")
    return ranker


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error means that memory ran out. For GPUs torch has an error class, for the CPU only a message."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def reranker_of(ranker: Ranker) -> Reranker:
    """The ranker itself if it is a Reranker, otherwise the Reranker that it wraps."""
    return ranker if isinstance(ranker, Reranker) else cast(Reranker, ranker.reranker)  # type: ignore[attr-defined]


def key(reranker: Reranker) -> str:
    """A string that identifies loaded models."""
    return repr(reranker.engine.spec)


def chosen(texts: TextFiles, queries: Sequence[QueryPositions]) -> dict[str, str]:
    """id → text of all candidates of these queries."""
    places = {d: p for query, positions in queries for d, p in zip(query.candidates.documents, positions.tolist())}
    return dict(zip(places, texts.read(list(places.values()))))


def _rank(worker: Worker, ranker: Ranker, texts: TextFiles, queries: Sequence[QueryPositions]) -> list[Record]:
    return list(rank(ranker, [query for query, _ in queries], chosen(texts, queries), 0 if worker.warm else WARM_UP))


def _cold(worker: Worker, ranker: Ranker, texts: TextFiles, queries: Sequence[QueryPositions], label: str, about: Mapping[str, str]) -> ColdCost:
    return cold(label, ranker, [query for query, _ in queries], chosen(texts, queries), about, worker.cache)


def _about(worker: Worker, ranker: Ranker) -> ModelFacts:
    return about(reranker_of(ranker))


def _search(worker: Worker, ranker: Ranker, texts: TextFiles, plan: str, n: int, queries: Sequence[str], fetch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The nearest documents in block n of a plan, as numpy arrays."""
    reranker = reranker_of(ranker)
    block = reranker.pooled(texts.read(planned(worker.cache, plan, n, CORPUS_BLOCK)))
    found = search_block(query_batches(reranker, queries), block, fetch, reranker.similarity)
    return [(values.cpu().numpy(), places.cpu().numpy()) for values, places in found]


def _lacking(worker: Worker, ranker: Ranker, texts: TextFiles, plan: str, n: int, detail: Detail) -> list[int]:
    """Numbers of the chunks in block n of a plan that have texts without vectors in the cache."""
    size = CHUNK[detail]
    lacks = reranker_of(ranker).lacks(texts.read(planned(worker.cache, plan, n, CORPUS_BLOCK)), detail=detail)
    return sorted({n * CORPUS_BLOCK // size + i // size for i, lacking in enumerate(lacks) if lacking})


WORK: dict[str, Callable[..., Any]] = {"rank": _rank, "cold": _cold, "about": _about, "lacking": _lacking, "search": _search}


def planned(cache: Store, plan: str, n: int, size: int) -> np.ndarray:
    """Positions of the texts in chunk n of a plan; a chunk has `size` texts, the last one may have fewer."""
    positions = np.load(cache.child(PLANS).fetch(plan), mmap_mode="r")
    return np.asarray(positions[n * size : (n + 1) * size])


def probe(setup: WorkerSetup) -> None:
    """Checks that a worker can start here: starts one, or raises why not."""
    Worker(setup)


class ChunkEncoder:
    """Encodes chunks of texts into the cache, as an actor in Ray Data's pool."""

    def __init__(self, setup: WorkerSetup, packed_ranker: bytes, expected: dict[str, str | None] | None, texts: TextFiles, plan: str, detail: int):
        import ray

        self.worker, self.texts, self.plan, self.detail = Worker(setup), texts, plan, Detail(detail)
        self.again = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self.problem = ""
        try:
            self.reranker = reranker_of(opened(packed_ranker, expected, self.worker.engines))
        except (UserError, ModelError, OSError, RuntimeError, ImportError) as error:
            self.problem = str(error) or type(error).__name__

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        (chunk,), problem, kind, count = batch["item"].tolist(), self.problem, "load", 0
        if not problem:
            try:
                texts = self.texts.read(planned(self.worker.cache, self.plan, chunk, CHUNK[self.detail]))
                count = len(texts)
                self.reranker.encode(texts, detail=self.detail)
                if self.reranker.cache_state != "disk":
                    raise OSError(f"{self.worker.cache.shown} cannot be written")
            except ModelError as error:
                problem, kind = str(error), "model"
            except (RuntimeError, MemoryError, OSError, ValueError, LookupError) as error:  # the other chunks go on, and this one is tried again elsewhere
                problem, kind = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".strip(": "), "memory" if out_of_memory(error) else "other"
        return {
            "chunk": [chunk], "texts": [count], "node": [self.worker.node], "pid": [os.getpid()], "again": [self.again],
            "problem": [problem], "kind": [kind if problem else ""],
        }  # fmt: skip
