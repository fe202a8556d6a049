"""What a process of a cluster does for an evaluation: loads the models once, reads texts and vectors from the shared cache, and answers calls."""

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
from rerank_lab.eval.records import Cold, QueryCandidates, Record
from rerank_lab.eval.rows import WARM_UP, Ranks, cold, rank
from rerank_lab.models.base import Detail
from rerank_lab.reranker import CORPUS_BLOCK, Reranker

QueryPositions = tuple[QueryCandidates, np.ndarray]  # a query, and the positions of its candidates' texts


@dataclass(frozen=True)
class Setup:
    """What a worker is told once.

    Attributes:
        cache: the shared folder or URL.
        kernels, threads: as the options have them.
    """

    cache: str
    kernels: str
    threads: int | None


@dataclass(frozen=True)
class Location:
    """Where a worker runs: Ray's id of the node, and what machine that is."""

    node: str
    machine: str


class Worker:
    """A process with models, loaded once and for as long as it lives."""

    def __init__(self, setup: Setup):
        import ray

        self.setup, self.cache, self.seen, self.ranked = setup, Store(setup.cache), 0, b""
        self.engines = Engines()  # a row's models, and the same in fp32 beside them
        self.texts: dict[TextFiles, TextFiles] = {}  # each with the files that it has open
        self.node: str = ray.get_runtime_context().get_node_id()
        if setup.threads:
            torch.set_num_threads(setup.threads)
        logging.getLogger("rerank_lab").setLevel(logging.ERROR)
        use_backend(setup.kernels).__enter__()

    def hello(self) -> Location:
        """Where it is."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        machine = describe(device)
        return Location(self.node, f"{machine.cpu}, {machine.threads} threads, device {machine.device}")

    def call(self, work: str, what: bytes, expected: dict[str, str | None] | None, turn: int, *arguments: Any) -> tuple[str, Any]:
        """One of the functions below.

        Args:
            work: its name.
            what: the Reranker or what else ranks, packed.
            expected: fingerprints that its models must have.
            turn: grows whenever the cache has; then it is looked at again.
            arguments: of the function.

        Returns:
            ("done", what the function gave) or ("failed", why this worker cannot do it here).
        """
        try:
            ranks = opened(what, expected, self.engines)
        except (UserError, ModelError, OSError, RuntimeError, ImportError) as error:
            return "failed", str(error) or type(error).__name__
        self.warm, self.ranked = what == self.ranked, what if work == "rank" else self.ranked
        if turn != self.seen:
            reranker_of(ranks).refresh()
            self.seen = turn
        known = [self.texts.setdefault(a, a) if isinstance(a, TextFiles) else a for a in arguments]
        return "done", WORK[work](self, ranks, *known)


def opened(what: bytes, expected: dict[str, str | None] | None, engines: Engines) -> Ranks:
    """What was packed, its models loaded, and checked to be those that all others have."""
    ranks: Ranks = unpickled(what, engines)
    found = reranker_of(ranks).fingerprints()
    differing = ", ".join(f"{k} {v} instead of {expected[k]}" for k, v in found.items() if v != expected[k] and v is not None) if expected else ""
    if differing:
        raise UserError(f"other models than on the node that began: {differing}")
    return ranks


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says so: torch has one of its own for GPUs, and none for the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def reranker_of(ranks: Ranks) -> Reranker:
    """The Reranker that ranks, or that stands behind what does."""
    return ranks if isinstance(ranks, Reranker) else cast(Reranker, ranks.reranker)  # type: ignore[attr-defined]


def key(reranker: Reranker) -> str:
    """What tells loaded models apart."""
    return repr(reranker.engine.spec)


def chosen(texts: TextFiles, queries: Sequence[QueryPositions]) -> dict[str, str]:
    """id → text of all candidates of these queries, which come with the candidates' positions."""
    places = {d: p for query, positions in queries for d, p in zip(query.candidates.documents, positions.tolist())}
    return dict(zip(places, texts.read(list(places.values()))))


def _rank(worker: Worker, ranks: Ranks, texts: TextFiles, queries: Sequence[QueryPositions]) -> list[Record]:
    return list(rank(ranks, [query for query, _ in queries], chosen(texts, queries), 0 if worker.warm else WARM_UP))


def _cold(worker: Worker, ranks: Ranks, texts: TextFiles, queries: Sequence[QueryPositions], label: str, about: Mapping[str, str]) -> Cold:
    return cold(label, ranks, [query for query, _ in queries], chosen(texts, queries), about, worker.cache)


def _about(worker: Worker, ranks: Ranks) -> ModelFacts:
    return about(reranker_of(ranks))


def _search(worker: Worker, ranks: Ranks, texts: TextFiles, plan: str, n: int, queries: Sequence[str], fetch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The nearest in block n of a plan, as numpy arrays."""
    reranker = reranker_of(ranks)
    block = reranker.pooled(texts.read(planned(worker.cache, plan, n, CORPUS_BLOCK)))
    found = search_block(query_batches(reranker, queries), block, fetch, reranker.similarity)
    return [(values.cpu().numpy(), places.cpu().numpy()) for values, places in found]


def _lacking(worker: Worker, ranks: Ranks, texts: TextFiles, plan: str, n: int, detail: Detail) -> list[int]:
    """The chunks in block n of a plan that hold texts whose vectors are not all in the cache."""
    size = CHUNK[detail]
    lacks = reranker_of(ranks).lacks(texts.read(planned(worker.cache, plan, n, CORPUS_BLOCK)), detail=detail)
    return sorted({n * CORPUS_BLOCK // size + i // size for i, lacking in enumerate(lacks) if lacking})


WORK: dict[str, Callable[..., Any]] = {"rank": _rank, "cold": _cold, "about": _about, "lacking": _lacking, "search": _search}


def planned(cache: Store, plan: str, n: int, size: int) -> np.ndarray:
    """Positions of the texts of chunk n."""
    positions = np.load(cache.child(PLANS).fetch(plan), mmap_mode="r")
    return np.asarray(positions[n * size : (n + 1) * size])


def probe(setup: Setup) -> None:
    """Does what a worker does first; that it returns says that one can begin there."""
    Worker(setup)


class Encoder:
    """Encodes chunks of texts into the cache; an actor of Ray Data's pool."""

    def __init__(self, setup: Setup, what: bytes, expected: dict[str, str | None] | None, texts: TextFiles, plan: str, detail: int):
        import ray

        self.worker, self.texts, self.plan, self.detail = Worker(setup), texts, plan, Detail(detail)
        self.again = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self.problem = ""
        try:
            self.reranker = reranker_of(opened(what, expected, self.worker.engines))
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
            except (RuntimeError, MemoryError, OSError, ValueError, LookupError) as error:  # the other chunks can be done, and this one again elsewhere
                problem, kind = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".strip(": "), "memory" if out_of_memory(error) else "other"
        return {
            "chunk": [chunk], "texts": [count], "node": [self.worker.node], "pid": [os.getpid()], "again": [self.again],
            "problem": [problem], "kind": [kind if problem else ""],
        }  # fmt: skip
