"""The work of an evaluation on a Ray cluster: a pool of actors encodes texts (Ray Data), actors rank queries, and this process gathers the results.

Vectors and texts go through the shared cache (cache/store.py), never through Ray. Ray carries names, numbers of chunks, queries with
their candidates' ids, and records. If a worker dies, another one does the chunks or queries that it held. Finished work is not lost:
vectors are in the cache, and records are in the journal.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from rerank_lab.cache.places import PLANS, VECTORS
from rerank_lab.cache.store import Store
from rerank_lab.cache.vectors import CHUNK
from rerank_lab.datasets.corpus import Corpus, TextFiles
from rerank_lab.engine import pickled
from rerank_lab.environment import Cluster
from rerank_lab.errors import ModelError, UserError
from rerank_lab.eval.executors.base import ModelFacts, merged
from rerank_lab.eval.executors.quiet import LogWriter, short, without_stderr
from rerank_lab.eval.executors.worker import ChunkEncoder, Worker, WorkerSetup, key, out_of_memory, probe, reranker_of
from rerank_lab.eval.records import ColdCost, QueryCandidates, Record
from rerank_lab.eval.rows import Ranker, bar, document_progress
from rerank_lab.first_stage.base import TopK
from rerank_lab.models.base import Detail
from rerank_lab.reranker import CORPUS_BLOCK, Reranker

log = logging.getLogger("rerank_lab")
QUERIES = 16  # queries that one call ranks
AHEAD = 2  # calls that a worker holds at once, including the one that it works on
TRIES = 3  # after so many failures in a row, the work itself is at fault, not the workers


class RayExecutor:
    """Does the work on a Ray cluster.

    Args:
        address: "local" for a cluster that ends with this object; "auto" or HOST:PORT for a cluster that is running.
        cache: a folder or URL that all nodes reach.
        workers: number of workers; None: as many as the cluster has room for.
        resources: of one worker: CPU, GPU, memory (bytes), or a custom resource.
        kernels, threads: as in the options.

    Attributes:
        excluded: node id → why no worker runs there.
        machines: machine → number of calls that it has answered.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or it has no room for one worker.
    """

    name = "ray"

    def __init__(self, address: str, cache: str, *, workers: int | None, resources: Mapping[str, float], kernels: str, threads: int | None):
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray
            import ray.data
        except ImportError:
            raise UserError("--executor ray needs Ray: pip install 'rerank_lab[ray]'") from None
        self.ray, self.cache, self.setup = ray, Store(cache), WorkerSetup(cache, kernels, threads or max(1, int(resources.get("CPU", 1))))
        self.resources, self.workers = dict(resources), workers
        self.excluded: dict[str, str] = {}
        self.machines: Counter[str] = Counter()
        self._handles: list[WorkerHandle] = []
        self._expected: dict[str, dict[str, str | None]] = {}
        self._encoded: set[tuple[Any, ...]] = set()
        self._cache_version = 0
        self._stdout = redirect_stdout(LogWriter())
        self._stdout.__enter__()  # Ray prints news of its workers to stdout, which is for the results
        self._owned = not ray.is_initialized()
        try:
            if self._owned:
                self._connect(address)
            if (room := self._room()) < (workers or 0):
                log.warning("--workers %d: the cluster has room for %d", workers, room)
            self._shared()
        except (UserError, ModelError):
            self.close()
            raise
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_errored_blocks = -1  # another round does what a worker lost

    def _connect(self, address: str) -> None:
        if "://" in address:
            raise UserError(f"--address {address}: run the command on a machine of the cluster, with --address auto or HOST:PORT")
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.CRITICAL}
        if address == "local":
            cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            share = self.resources.get("CPU", 0)
            wanted = math.ceil((self.workers or 1) * share) if share <= cpus else 0  # one worker with more cores than there are is an error
            room = {k: v * (self.workers or 1) for k, v in self.resources.items() if k not in ("CPU", "GPU", "memory")}
            options |= {"num_cpus": max(cpus, wanted), "include_dashboard": False, "object_store_memory": 200_000_000, "resources": room}
        host, _, port = address.rpartition(":")
        try:
            if host:  # without this check, Ray would wait for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            with without_stderr():  # Ray's libraries write past Python
                self.ray.init(**options)
        except (OSError, ValueError, RuntimeError) as error:
            remedy = "ray start --head begins one; --address local needs none"
            raise UserError(f"--address {address}: no Ray cluster answers ({str(error).partition(chr(10))[0]}); {remedy}") from None

    def _shared(self) -> None:
        """Checks that the cache can be written and that other processes see it; otherwise raises UserError."""
        if self.cache.place.startswith("memory:"):
            raise UserError("--cache memory://: each process has its own; workers share vectors through a folder or URL that all of them reach")
        try:
            self.cache.child(PLANS).write("probe", b"")
            self.cache.child(PLANS).remove("probe")
            (self.cache if self.cache.remote else self.cache.child(VECTORS)).folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {self.cache.shown} cannot be written: {error.strerror or error}") from None

    def _room(self) -> int:
        """How many workers fit into the usable nodes, at most the number asked for.

        Raises:
            UserError: no node has room for a worker. ModelError: nodes would have room, but models do not load there.
        """
        room = 0
        for node in self.ray.nodes():
            if node["Alive"] and node["NodeID"] not in self.excluded:
                room += min(int(node["Resources"].get(name, 0.0) / amount + 1e-6) for name, amount in self.resources.items())
        if room == 0 and self.excluded:
            raise ModelError("no node is left that can work: " + "; ".join(f"node {node[:8]}: {why}" for node, why in self.excluded.items()))
        if room == 0:
            wanted = ", ".join(f"{k}={v:g}" for k, v in self.resources.items())
            raise UserError(f"--resources {wanted}: no node of the cluster has as much; ray status shows what they have")
        return min(room, self.workers or room)

    def _options(self) -> dict[str, Any]:
        """Ray's options for an actor: its share of a node, and the nodes to avoid."""
        own = {k: v for k, v in self.resources.items() if k not in ("CPU", "GPU", "memory")}
        options: dict[str, Any] = {"num_cpus": self.resources.get("CPU", 0), "num_gpus": self.resources.get("GPU", 0), "resources": own or None}
        if "memory" in self.resources:
            options["memory"] = self.resources["memory"]
        if self.excluded:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self.excluded)})"}
        return options

    def corpus(self) -> Corpus | None:
        return Corpus(self.cache)

    def about(self, reranker: Reranker) -> ModelFacts:
        (found,) = self._calls(reranker, "about", 1, lambda n: ())
        about = cast(ModelFacts, found[1])
        self.machines = Counter()
        self._expected[key(reranker)] = about.models
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        calls = self.machines  # not a copy: it keeps counting
        cluster = Cluster(name="ray", version=self.ray.__version__, workers=self._room(), resources=self.resources, nodes=len(nodes), calls=calls)
        return replace(about, environment=replace(about.environment, executor=cluster))

    def encode(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], detail: Detail, title: str) -> None:
        assert isinstance(corpus, Corpus)
        plan, total = self._plan(corpus, ids)
        encoded = (plan, key(reranker), reranker.max_tokens)
        if any(done[:3] == encoded and done[3] >= detail for done in self._encoded):
            return
        checks = self._calls(reranker, "lacking", -(-total // CORPUS_BLOCK), lambda n: (corpus.texts, plan, n, detail))
        left, stalled = {chunk for _, chunks in checks for chunk in chunks}, 0
        if left:
            self._stop_all()
        total = min(total, len(left) * CHUNK[detail])
        with document_progress(title) as progress:
            while left:
                before = len(left)
                problem = self._round(reranker, corpus.texts, plan, detail, left, lambda done: progress(done, total))
                stalled = stalled + 1 if len(left) == before else 0
                if left and stalled == TRIES:
                    why = problem or "their logs are in Ray's session folder"
                    raise ModelError(f"{title}: {TRIES} times in a row no worker has finished any of {before} chunks ({why})")
        self._cache_version += 1
        self._encoded.add((*encoded, detail))

    def _round(self, reranker: Reranker, texts: TextFiles, plan: str, detail: Detail, left: set[int], progress: Callable[[int], object]) -> str:
        """Gives all chunks in `left` to a pool of actors and removes the finished ones from it. Returns a problem of the others; "": none is known."""
        from ray.data import ActorPoolStrategy

        ray, count, size = self.ray, self._room(), len(left)
        pool = min(count, size)
        arguments = (self.setup, self._packed(reranker), self._expected.get(key(reranker)), texts, plan, int(detail))
        # An actor that is ready first takes as many chunks as it may hold. If there are few chunks, it may hold only one.
        strategy = ActorPoolStrategy(size=pool, max_tasks_in_flight_per_actor=AHEAD if size > 8 * pool else 1)
        found = ray.data.from_items(sorted(left), override_num_blocks=min(size, max(64 * pool, 200))).map_batches(
            ChunkEncoder, fn_constructor_args=arguments, batch_size=1, compute=strategy,
            max_restarts=-1, max_task_retries=TRIES, **self._options(),
        )  # fmt: skip
        died, problems = set[str](), Counter[str]()
        try:
            for row in found.iter_rows():
                if row["again"] and (name := f"{row['node']}/{row['pid']}") not in died:
                    died.add(name)
                    log.warning("a worker on node %s died while encoding and was started again; what it held is done again", row["node"][:8])
                if row["kind"] == "load":
                    self._exclude(row["node"], row["problem"])
                elif row["kind"] == "model":
                    raise ModelError(row["problem"])
                elif row["kind"]:
                    problems[row["problem"] + (": fewer workers a node (--resources) leave each more" if row["kind"] == "memory" else "")] += 1
                else:
                    left.remove(row["chunk"])
                    progress(row["texts"])
        except ray.exceptions.RayError as error:
            log.warning("encoding stopped: %s", short(error))
            self._diagnose()
        for problem, times in problems.items():
            log.warning("%d chunks failed and are done again (%s)", times, problem)
        if (lost := len(left) - sum(problems.values())) > 0 and len(left) < size:
            log.warning("%d of %d chunks were lost with their workers and are done again", lost, size)
        return next(iter(problems), "")

    def search(self, reranker: Reranker, corpus: Mapping[str, str], ids: Sequence[str], queries: Sequence[str], fetch: int) -> list[TopK]:
        assert isinstance(corpus, Corpus)
        self.encode(reranker, corpus, ids, Detail.POOLED, "encode corpus")
        plan, total = self._plan(corpus, ids)
        count = -(-total // CORPUS_BLOCK)
        calls = self._calls(reranker, "search", count, lambda n: (corpus.texts, plan, n, list(queries), fetch))
        found = dict(bar(calls, "dense retrieval", count))
        blocks = ([(torch.from_numpy(values.copy()), torch.from_numpy(places.copy())) for values, places in found[n]] for n in range(count))
        return merged(blocks, fetch)

    def rank(self, ranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str]) -> Iterator[Record]:
        assert isinstance(corpus, Corpus)

        def arguments(n: int) -> tuple[Any, ...]:
            block = queries[n * QUERIES : (n + 1) * QUERIES]
            return corpus.texts, [(query, corpus.positions(query.candidates.documents)) for query in block]

        for _, records in self._calls(ranker, "rank", -(-len(queries) // QUERIES), arguments):
            yield from records

    def cold(self, label: str, ranker: Ranker, queries: Sequence[QueryCandidates], corpus: Mapping[str, str], about: Mapping[str, str]) -> ColdCost:
        assert isinstance(corpus, Corpus)
        with_positions = [(query, corpus.positions(query.candidates.documents)) for query in queries]
        ((_, found),) = self._calls(ranker, "cold", 1, lambda n: (corpus.texts, with_positions, label, dict(about)))
        return cast(ColdCost, found)

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started here."""
        with suppress(Exception):  # Ray may be in any state, and the rest must be done too
            self._stop_all()
        if self._owned:
            self.ray.shutdown()
        self._stdout.__exit__(None, None, None)

    def _calls(self, ranker: Ranker, work: str, count: int, arguments: Callable[[int], tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Has workers answer calls 0 to count - 1 of one kind of work (a name in worker.WORK); arguments(n) gives the arguments of call n.

        Yields (n, answer), in the order in which calls end. The calls of a worker that dies are made again.

        Raises:
            ModelError: workers fail again and again, or no node is left. Errors of the work itself pass through.
        """
        ray, packed_ranker, expected = self.ray, self._packed(ranker), self._expected.get(key(reranker_of(ranker)))
        waiting, stalled = deque(range(count)), 0
        held: dict[Any, tuple[WorkerHandle, int]] = {}
        try:
            while waiting or held:
                self._start_workers(min(self._room(), len(waiting) + len(held)))
                while waiting and (free := [handle for handle in self._handles if handle.ready and handle.holds < AHEAD]):
                    handle, n = min(free, key=lambda handle: handle.holds), waiting.popleft()
                    handle.holds += 1
                    held[handle.actor.call.remote(work, packed_ranker, expected, self._cache_version, *arguments(n))] = handle, n
                beginning = {handle.hello: handle for handle in self._handles if not handle.ready}
                done, _ = ray.wait([*beginning, *held], num_returns=1, timeout=60.0)
                if not done and not held:
                    log.warning("waiting for a worker: the cluster has no room free (ray status shows who has it)")
                lost = ""
                for ref in done:
                    handle, n = held.pop(ref) if ref in held else (beginning[ref], -1)
                    try:
                        answer = ray.get(ref)
                    except ray.exceptions.RayTaskError as error:
                        cause = error.cause
                        if not out_of_memory(cause):
                            raise cause if isinstance(cause, (ValueError, ModelError, OSError)) else ModelError(short(error)) from None
                        lost = f"out of memory: {short(cause)}"
                    except ray.exceptions.RayError as error:
                        lost = short(error)
                        if n < 0:
                            self._diagnose()
                    else:
                        if n < 0:
                            handle.ready, handle.node, handle.machine = True, answer.node, answer.machine
                        elif answer[0] == "failed":
                            waiting.appendleft(n)
                            self._exclude(handle.node, answer[1])
                            waiting.extendleft(self._stop([other for other in self._handles if other.node == handle.node], held))
                        else:
                            handle.holds, stalled = handle.holds - 1, 0
                            self.machines[handle.machine] += 1
                            yield n, answer[1]
                        continue
                    again = [*([n] if n >= 0 else []), *self._stop([handle], held)]
                    waiting.extendleft(reversed(again))
                    stalled += 1
                    affected = f"{len(again)} calls of {work} are" if again else "nothing is"
                    log.warning("a worker on node %s is gone (%s); %s done again", handle.node[:8] or "?", lost, affected)
                if stalled == 2 * TRIES:
                    raise ModelError(f"{work}: workers end one after another without finishing anything; the last: {lost}")
        finally:
            if held:  # the caller stopped early and does not want the answers
                self._stop_all()

    def _start_workers(self, count: int) -> None:
        """Starts workers until there are `count`."""
        remote = self.ray.remote(Worker)
        while len(self._handles) < count:
            actor = remote.options(**self._options(), max_restarts=0).remote(self.setup)
            self._handles.append(WorkerHandle(actor, actor.hello.remote()))

    def _stop(self, handles: Sequence[WorkerHandle], held: dict[Any, tuple[WorkerHandle, int]]) -> list[int]:
        """Ends workers. Returns the numbers of the calls that they held."""
        numbers = []
        for handle in handles:
            with suppress(self.ray.exceptions.RayError, ValueError):
                self.ray.kill(handle.actor)
            if handle in self._handles:
                self._handles.remove(handle)
            for ref in [ref for ref, (other, _) in held.items() if other is handle]:
                numbers.append(held.pop(ref)[1])
        return numbers

    def _stop_all(self) -> None:
        """Ends all workers, so that their share of the cluster is free."""
        self._stop(list(self._handles), {})

    def _exclude(self, node: str, problem: str) -> None:
        """Stops using a node."""
        if node not in self.excluded:
            self.excluded[node] = problem
            log.warning("node %s cannot work and is left out: %s", node[:8], problem)
            self._room()

    def _diagnose(self) -> None:
        """Excludes the nodes where no worker can start."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        start = self.ray.remote(probe)
        nodes = [node["NodeID"] for node in self.ray.nodes() if node["Alive"] and node["NodeID"] not in self.excluded]
        for node in nodes:
            on_node = start.options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            try:
                self.ray.get(on_node.remote(self.setup), timeout=60.0)
            except self.ray.exceptions.RayError as error:
                self._exclude(node, short(error))

    def _packed(self, ranker: Ranker) -> bytes:
        """The ranker as bytes; it is loaded with the shared cache."""
        return pickled(ranker, cache_dir=self.setup.cache)

    def _plan(self, corpus: Corpus, ids: Sequence[str]) -> tuple[str, int]:
        """Writes the positions of these documents' distinct texts to the cache. Returns the file's name and the number of positions."""
        positions = corpus.distinct(corpus.positions(ids))
        buffer = io.BytesIO()
        np.save(buffer, positions)
        name = f"{hashlib.blake2b(buffer.getvalue(), digest_size=16).hexdigest()}.npy"
        plans = self.cache.child(PLANS)
        if name not in plans.names():
            plans.write(name, buffer.getvalue())
        return name, len(positions)


@dataclass(eq=False)
class WorkerHandle:
    """What this process knows of a worker.

    Attributes:
        actor: Ray's handle.
        hello: Ray's reference to the answer that the worker gives when it is ready.
        ready: whether it has given it.
        node, machine: Ray's id of its node, and a description of the machine; known when it is ready.
        holds: number of calls that it has been given and has not answered.
    """

    actor: Any
    hello: Any
    ready: bool = False
    node: str = ""
    machine: str = ""
    holds: int = 0
