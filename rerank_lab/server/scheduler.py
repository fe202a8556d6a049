"""The queue in front of the one thread that runs the models.

A batch is filled from all waiting rankings, up to a budget in padded tokens. Three quarters of it are filled in the order in which
rankings are due. A ranking that fits into one batch is due at its arrival. A larger one is due later: four times the time that the
rest of it takes. So ordinary requests are answered in turn, and none waits longer than one batch for a huge one. The last quarter
belongs to the oldest ranking, which therefore always makes progress.
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

OLDEST_SHARE = 4  # one of so many parts of a batch belongs to the oldest ranking
LONG_CHARACTERS = 1 << 16  # requests with more characters are tokenised on threads of their own, so that others need not wait


@dataclass(eq=False)
class Job:
    """A ranking that waits or runs.

    Attributes:
        future: receives the ranking, or an error.
        batch_size: the most units in one batch; None: as many as fit.
        size: tokens of the units that have not run; the queue's sum includes them.
        arrived: time of arrival (perf_counter).
        steps: the ranking's steps; None: not tokenised yet, or ended.
        todo: units that have not run; the next one is last.
        gone: whether it has ended or its client has left.
        alone: whether it found the queue empty. Then it is accepted in any size.
        due: the time at which it should end (perf_counter).
        waiting, model, scoring: seconds from arrival to the first batch, in batches, and in scoring.
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
    """A batch that is being filled.

    Attributes:
        units: group → units with their jobs.
        taken: job → number of its units in the batch.
        padded: tokens of the batch, with padding.
    """

    def __init__(self) -> None:
        self.units: dict[Hashable, list[tuple[Job, Unit]]] = defaultdict(list)
        self.taken: dict[Job, int] = defaultdict(int)
        self.padded = 0
        self._longest: dict[Hashable, int] = defaultdict(int)

    def take(self, job: Job, room: int, *, at_least: int = 0) -> None:
        """Moves a job's units into the batch.

        Args:
            job: the job.
            room: the most padded tokens of the batch.
            at_least: this many units go in even if there is no room.
        """
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
        budget: the most padded tokens of a batch.
        max_queue_tokens: the most tokens that may wait. A ranking that finds the queue empty is accepted in any size.
        metrics: counts batches, tokens and rankings.
    """

    def __init__(self, budget: int, max_queue_tokens: int, metrics: Metrics):
        self.budget, self.max_queue_tokens, self.metrics = budget, max_queue_tokens, metrics
        self._jobs: list[Job] = []
        self._tokens, self._closed = 0, False
        self._recent = [1000.0, 0.1]  # tokens that ran and the seconds that they took; older batches weigh less
        self._condition = threading.Condition()
        self._short = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        self._long = ThreadPoolExecutor(2, thread_name_prefix="tokenise-long")

    async def run(self, make: Callable[[], Steps], characters: int, *, tokens: int | None = None, batch_size: int | None = None) -> tuple[Ranking, Job]:
        """Ranks one request.

        Args:
            make: tokenises the request; it runs on a thread.
            characters: number of characters in query and documents.
            tokens: an estimate of its tokens until they are known; None: a quarter of the characters.
            batch_size: the most of its units in one batch; None: as many as fit.

        Returns:
            the ranking, and its job with the times that it took.

        Raises:
            Refusal: 429, the queue is full. asyncio.CancelledError: the caller gave up; waiting units are dropped.
            Errors of a model are raised as they are.
        """
        loop = asyncio.get_running_loop()
        job = Job(loop.create_future(), batch_size, 0)
        with self._condition:
            job.alone = not self._tokens
            self._admit(job, 1 + characters // 4 if tokens is None else tokens)
        self.metrics.requests_waiting.inc()
        try:
            steps = await loop.run_in_executor(self._long if characters > LONG_CHARACTERS else self._short, make)
            self._enqueue(job, steps)
            return await job.future, job
        finally:
            self.metrics.requests_waiting.dec()
            self._forget(job)

    def work(self) -> None:
        """Runs batches until `close`. Call it on the thread that loaded and warmed the models, and on no other.

        OpenMP gives each thread that computes its own team of threads. With more threads than cores, all of them sleep between loops.
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
        """Ends `work` after the batch that is running."""
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
                job.due = job.arrived + OLDEST_SHARE * self._seconds(max(0, job.size - self.budget))
                self._jobs.append(job)
                self._condition.notify()

    def _forget(self, job: Job) -> None:
        """Removes a job from the queue and its tokens from the sum. Does nothing if the job has ended already."""
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
        """Sets a job's size and counts it in the queue.

        Raises:
            Refusal: 429, the queue holds too much beside it.
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
        """An estimate of the time that so many tokens take, from the latest batches."""
        return tokens * self._recent[1] / self._recent[0]

    def _plan(self) -> Batch:
        """Fills a batch: most of it in the order in which jobs are due, the rest for the oldest job, and room that is left for all again."""
        batch, in_turn = Batch(), sorted(self._jobs, key=lambda job: job.due)
        for job in in_turn:
            batch.take(job, self.budget - self.budget // OLDEST_SHARE, at_least=0 if batch.units else 1)
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
        self._recent = [0.95 * self._recent[0] + tokens, 0.95 * self._recent[1] + seconds]
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
        except Exception as error:  # noqa: BLE001 - a model's error answers the requests of this batch, and the thread goes on
            self.metrics.failed_batches.inc()
            jobs = list(dict.fromkeys(job for job, _ in members))
            if len(jobs) == 1:
                self._end(jobs[0], error)
                return
            for job in jobs:  # each job alone, so that only the faulty one fails
                self._run_group([member for member in members if member[0] is job])

    def _advance(self, job: Job) -> None:
        start = time.perf_counter()
        steps = job.steps
        if steps is None:  # the client has just left
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
        """Gives the outcome to the caller of `run`."""

        def hand_over() -> None:
            if not job.future.done():
                if isinstance(outcome, Exception):
                    job.future.set_exception(outcome)
                else:
                    job.future.set_result(outcome)

        self._forget(job)
        with suppress(RuntimeError):  # the loop has ended
            job.future.get_loop().call_soon_threadsafe(hand_over)
