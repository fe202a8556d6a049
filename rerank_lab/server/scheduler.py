"""The queue before the one thread that runs the models.

A batch is filled from all rankings that wait, up to a budget in padded tokens. Three quarters of it go by when each is due: a
ranking that fits into one batch at its arrival, a larger one later by four times what the rest of it takes. So ordinary requests
are answered in turn, and none waits for a huge one longer than a batch. The last quarter is the oldest's, which so always gets on.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from rerank_lab.reranker import Ranking
from rerank_lab.server.contract import Refusal
from rerank_lab.server.metrics import Metrics
from rerank_lab.server.steps import Steps, Unit

SHARE = 4  # the oldest ranking's part of a batch is one of so many
LONG = 1 << 16  # characters; longer requests are tokenised on threads of their own, so that they keep nobody waiting


@dataclass(eq=False)
class Job:
    """A ranking that waits or runs.

    Attributes:
        todo: units that have not run, the next one last.
        size: tokens of those, kept in the queue's sum.
        batch_size: units in one batch at most.
        alone: whether it found the queue empty; then it is taken whatever its size.
        due: when it should have ended, on perf_counter's clock.
        waiting, model, scoring: seconds, from arrival to the first batch, in batches, and in scoring.
    """

    future: asyncio.Future[Ranking]
    batch_size: int | None
    size: int
    arrived: float = field(default_factory=time.perf_counter)
    steps: Steps | None = None
    todo: list[Unit] = field(default_factory=list)
    gone: bool = False
    alone: bool = False
    due: float = 0.0
    waiting: float | None = None
    model: float = 0.0
    scoring: float = 0.0


class Batch:
    """Units in the making, by group, and the tokens that they take with their padding."""

    def __init__(self) -> None:
        self.units: dict[Hashable, list[tuple[Job, Unit]]] = defaultdict(list)
        self.taken: dict[Job, int] = defaultdict(int)
        self.padded = 0
        self._longest: dict[Hashable, int] = defaultdict(int)

    def take(self, job: Job, room: int, *, at_least: int = 0) -> None:
        """Moves a job's units into the batch while it stays within `room` padded tokens; so many go in any case."""
        while job.todo and (job.batch_size is None or self.taken[job] < job.batch_size):
            unit = job.todo[-1]
            group = unit.group
            count, longest = len(self.units.get(group, ())), max(unit.size, self._longest[group])
            padded = self.padded - self._longest[group] * count + longest * (count + 1)
            if padded > room and self.taken.get(job, 0) >= at_least:
                return
            self.units[group].append((job, job.todo.pop()))
            self.padded, self._longest[group] = padded, longest
            self.taken[job] += 1


class Scheduler:
    """Shares the models among rankings.

    Args:
        budget: padded tokens of a batch.
        max_queue_tokens: tokens that may wait; a ranking that finds the queue empty is taken whatever its size.
        metrics: where it counts.
    """

    def __init__(self, budget: int, max_queue_tokens: int, metrics: Metrics):
        self.budget, self.max_queue_tokens, self.metrics = budget, max_queue_tokens, metrics
        self._jobs: list[Job] = []
        self._tokens, self._closed = 0, False
        self._late = [1000.0, 0.1]  # tokens that ran and the seconds that they took, those of long ago worth less
        self._condition = threading.Condition()
        self._short = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        self._long = ThreadPoolExecutor(2, thread_name_prefix="tokenise-long")

    async def run(self, make: Callable[[], Steps], characters: int, *, tokens: int | None = None, batch_size: int | None = None) -> tuple[Ranking, Job]:
        """Ranks, and says what it took.

        Args:
            make: tokenises; run on a thread.
            characters: of query and documents.
            tokens: what it will take, roughly, until that is known; None: a quarter of the characters.
            batch_size: of its units in one batch.

        Raises:
            Refusal: 429, the queue is full. asyncio.CancelledError: what waits is dropped. Whatever a model raises.
        """
        loop = asyncio.get_running_loop()
        job = Job(loop.create_future(), batch_size, 0)
        with self._condition:
            job.alone = not self._tokens
            self._admit(job, 1 + characters // 4 if tokens is None else tokens)
        self.metrics.requests_waiting.inc()
        try:
            steps = await loop.run_in_executor(self._long if characters > LONG else self._short, make)
            self._enqueue(job, steps)
            return await job.future, job
        finally:
            self.metrics.requests_waiting.dec()
            self._forget(job)

    def work(self) -> None:
        """Runs batches until `close`, on the thread that loaded and warmed the models and on no other.

        OpenMP gives each thread that computes a team of its own, and more teams than cores make all of them sleep between loops.
        """
        while True:
            with self._condition:
                while not self._jobs and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                batch = self._plan()
            self._run(batch)
            for job in batch.taken:
                if not job.todo and not job.gone:
                    self._advance(job)

    def close(self) -> None:
        """Ends `work`, after the batch that runs."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, job: Job, steps: Steps) -> None:
        self.metrics.documents.labels("miss").inc(steps.pool.new)
        self.metrics.documents.labels("hit").inc(steps.pool.seen)
        with self._condition:
            if not job.gone:
                if not job.alone:
                    self._admit(job, sum(unit.size for unit in steps.units))
                job.steps = steps
                self._wants(job, steps.units)
                job.due = job.arrived + SHARE * self._seconds(max(0, job.size - self.budget))
                self._jobs.append(job)
                self._condition.notify()

    def _forget(self, job: Job) -> None:
        """Takes back what a job still holds; does nothing where it has ended by itself."""
        with self._condition:
            job.gone = True
            self._count(-job.size)
            job.size, job.todo, job.steps = 0, [], None
            if job in self._jobs:
                self._jobs.remove(job)

    def _wants(self, job: Job, units: Sequence[Unit]) -> None:
        job.todo = list(reversed(units))
        size = sum(unit.size for unit in units)
        self._count(size - job.size)
        job.size = size

    def _admit(self, job: Job, size: int) -> None:
        """Counts a job at this size, unless the queue holds too much beside it.

        Raises:
            Refusal: 429.
        """
        others = self._tokens - job.size
        if others and others + size > self.max_queue_tokens:
            self.metrics.dropped.labels("queue_full").inc()
            wait = max(1, round(self._seconds(others)))
            raise Refusal(429, f"The queue holds {others} of {self.max_queue_tokens} tokens; try again later.", {"Retry-After": str(wait)})
        self._count(size - job.size)
        job.size = size

    def _count(self, tokens: int) -> None:
        self._tokens += tokens
        self.metrics.queue_tokens.set(self._tokens)

    def _seconds(self, tokens: int) -> float:
        """What so many tokens take, going by the latest batches."""
        return tokens * self._late[1] / self._late[0]

    def _plan(self) -> Batch:
        """Most of a batch by when each is due, the rest for the oldest, and what is free then for all again."""
        batch, in_turn = Batch(), sorted(self._jobs, key=lambda job: job.due)
        for job in in_turn:
            batch.take(job, self.budget - self.budget // SHARE, at_least=0 if batch.units else 1)
        batch.take(self._jobs[0], self.budget, at_least=1)
        for job in in_turn:
            batch.take(job, self.budget)
        now = time.perf_counter()
        for job in batch.taken:
            job.waiting = now - job.arrived if job.waiting is None else job.waiting
        return batch

    def _run(self, batch: Batch) -> None:
        start, tokens = time.perf_counter(), 0
        for members in batch.units.values():
            self._run_group(members)
            tokens += sum(unit.size for _, unit in members)
        seconds = time.perf_counter() - start
        self._late = [0.95 * self._late[0] + tokens, 0.95 * self._late[1] + seconds]
        self.metrics.batch(tokens, batch.padded, seconds)
        with self._condition:
            for job in batch.taken:
                job.model += seconds
            for job, unit in (member for members in batch.units.values() for member in members):
                if not job.gone:
                    job.size -= unit.size
                    self._count(-unit.size)

    def _run_group(self, members: Sequence[tuple[Job, Unit]]) -> None:
        units = [unit for _, unit in members]
        try:
            units[0].run(units)
        except Exception as error:  # noqa: BLE001 - whatever a model raises is an answer to whom it concerns, and the thread lives on
            self.metrics.failed_batches.inc()
            jobs = list(dict.fromkeys(job for job, _ in members))
            if len(jobs) == 1:
                self._end(jobs[0], error)
                return
            for job in jobs:  # each alone, so that the one that cannot be done fails by itself
                self._run_group([member for member in members if member[0] is job])

    def _advance(self, job: Job) -> None:
        start = time.perf_counter()
        steps = job.steps
        if steps is None:  # its client has just left
            return
        try:
            ranking = steps.advance()
        except Exception as error:  # noqa: BLE001 - as above
            self._end(job, error)
            return
        job.scoring += time.perf_counter() - start
        if ranking is not None:
            self._end(job, ranking)
            return
        with self._condition:
            if not job.gone:
                self._wants(job, steps.units)

    def _end(self, job: Job, outcome: Ranking | Exception) -> None:
        """Hands the outcome to whoever waits for it."""

        def hand_over() -> None:
            if not job.future.done():
                if isinstance(outcome, Exception):
                    job.future.set_exception(outcome)
                else:
                    job.future.set_result(outcome)

        self._forget(job)
        with suppress(RuntimeError):  # the loop has ended
            job.future.get_loop().call_soon_threadsafe(hand_over)
