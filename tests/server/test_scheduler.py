"""The scheduler on the real model: shared batches, fairness, failures, and clients that leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import pytest

from rerank_lab.errors import ModelError
from rerank_lab.models.base import Detail, Tokens, Vectors
from rerank_lab.reranker import Ranking, Reranker
from rerank_lab.server.contract import Refusal
from rerank_lab.server.fleet import Fleet
from rerank_lab.server.metrics import Metrics
from rerank_lab.server.scheduler import Batch, Job, Scheduler
from rerank_lab.server.steps import Steps

BUDGET = 512


class Bench:
    """A scheduler over the real model, and a record of the texts in each of its batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_queue_tokens: int = 1 << 20):
        self.fleet = Fleet.load(["all-MiniLM-L6-v2"], [], device="cpu", cache_bytes=1 << 20)
        self.metrics = Metrics()
        self.scheduler = Scheduler(BUDGET, max_queue_tokens, self.metrics)
        threading.Thread(target=self.scheduler.work, daemon=True).start()
        self.reranker: Reranker = self.fleet.reranker("fast", "all-MiniLM-L6-v2", None)
        self.encoder = self.fleet.encoders["all-MiniLM-L6-v2"]
        self.batches: list[list[Tokens]] = []
        self.poison: int | None = None
        encode = self.encoder.encode_tokens

        def recorded(texts: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, **options: Any) -> Vectors:
            self.batches.append(list(texts))
            if any(self.poison in text.ids for text in texts):
                raise ModelError("broken on purpose")
            return encode(texts, detail=detail, **options)

        monkeypatch.setattr(self.encoder, "encode_tokens", recorded)

    async def rank(self, query: str, texts: list[str], batch_size: int | None = None) -> Ranking:
        return (await self.scheduler.run(lambda: Steps(self.reranker, query, texts), sum(map(len, texts)), batch_size=batch_size))[0]

    @property
    def idle(self) -> bool:
        return self.scheduler._tokens == 0 and not self.scheduler._jobs

    def batch_tokens(self) -> list[int]:
        return [sum(len(text) for text in batch) for batch in self.batches]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(monkeypatch)
    yield made
    made.scheduler.close()


def go(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def huge(mark: str, count: int = 40) -> list[str]:
    return [f"{mark} {n} " + "filler words that take their time " * 20 for n in range(count)]


def test_many_requests_share_batches_and_none_gets_anothers_answer(bench: Bench) -> None:
    async def all_of_them() -> list[Ranking]:
        return await asyncio.gather(*(bench.rank(f"number {n}", [f"number {n + i} is here" for i in range(-2, 3)]) for n in range(60)))

    rankings, shared = go(all_of_them()), list(bench.batches)
    assert len(shared) < 40 and max(map(len, shared)) > 10, "120 forwards if nobody shared"
    assert max(bench.batch_tokens()) <= BUDGET and bench.idle
    for n, ranking in enumerate(rankings):
        want = bench.reranker.without_cache().score(f"number {n}", [f"number {n + i} is here" for i in range(-2, 3)])
        assert ranking.order == want.order and ranking.relevance.tolist() == pytest.approx(want.relevance.tolist(), abs=1e-5)


def test_a_small_request_waits_for_one_batch_of_a_huge_one_at_most(bench: Bench) -> None:
    async def race() -> tuple[int, int]:
        large = asyncio.create_task(bench.rank("large", huge("large")))
        while len(bench.batches) < 3:
            await asyncio.sleep(0.001)
        before = len(bench.batches)
        await bench.rank("small", ["small one", "small two"])
        after = len(bench.batches)
        assert not large.done()
        await large
        return before, after

    before, after = go(race())
    # One batch was running. The next one held the small request's texts and its query, in a call each; the huge one's part of it is a third call.
    assert after - before <= 4


def test_requests_of_one_size_are_answered_in_turn(bench: Bench) -> None:
    ended: list[int] = []

    async def ranked(number: int) -> None:
        await bench.rank(f"number {number}", [f"number {number} text {i} " + "word " * (3 + number % 3) for i in range(40)])
        ended.append(number)

    async def in_turn() -> None:
        tasks = []
        for number in range(8):
            tasks.append(asyncio.create_task(ranked(number)))
            while len(bench.scheduler._jobs) + len(ended) < number + 1:
                await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)

    go(in_turn())
    assert ended == list(range(8))


def test_a_huge_request_gets_on_however_many_small_ones_come(bench: Bench) -> None:
    async def race() -> None:
        large = asyncio.create_task(bench.rank("large", huge("large", 12)))
        started = time.monotonic()
        number = 0
        while not large.done():
            assert time.monotonic() - started < 30, "starved"
            number += 8
            await asyncio.gather(*(bench.rank("small", [f"small {number + n} " * 20 for _ in range(5)]) for n in range(8)))

    go(race())


def test_a_failing_batch_fails_only_its_own_requests(bench: Bench) -> None:
    bench.poison = bench.encoder.tokenize(["poison"], "document", 10)[0].ids[1]

    async def mixed() -> list[Ranking | BaseException]:
        return await asyncio.gather(*(bench.rank("q", [f"text {n}", "poison" if n == 5 else "cure"]) for n in range(12)), return_exceptions=True)

    outcomes = go(mixed())
    assert [n for n, outcome in enumerate(outcomes) if isinstance(outcome, ModelError)] == [5]
    assert sum(isinstance(outcome, Ranking) for outcome in outcomes) == 11 and bench.idle
    assert len(go(bench.rank("q", ["alive"])).order) == 1, "the thread lives on"


def test_who_leaves_is_dropped_before_its_work_runs(bench: Bench) -> None:
    async def leave() -> int:
        first = asyncio.create_task(bench.rank("large", huge("large", 10)))
        while not bench.batches:
            await asyncio.sleep(0.001)
        leaver = asyncio.create_task(bench.rank("leaver", huge("leaver", 200)))
        while len(bench.scheduler._jobs) < 2:
            await asyncio.sleep(0.001)
        leaver.cancel()
        await first
        await asyncio.sleep(0.05)
        assert leaver.cancelled() and bench.idle
        return len(bench.batches)

    assert go(leave()) < 30, "200 documents would take over 60"


def test_a_full_queue_refuses_with_the_time_to_wait_and_an_empty_one_takes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, max_queue_tokens=100)

    async def fill() -> None:
        large = asyncio.create_task(bench.rank("large", huge("large")))
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as refusal:
            await bench.rank("q", ["one too many"])
        assert refusal.value.status == 429 and int(refusal.value.headers["Retry-After"]) >= 1
        assert isinstance(await large, Ranking)

    go(fill())
    assert bench.idle and bench.metrics.registry.get_sample_value("rerank_lab_dropped_total", {"reason": "queue_full"}) == 1
    bench.scheduler.close()


def test_what_is_larger_than_it_looked_is_refused_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, max_queue_tokens=3000)

    async def fill() -> None:
        first = asyncio.create_task(bench.rank("first", huge("first", 8)))
        await asyncio.sleep(0)
        texts = ["1 2 3 4 5 6 7 8 9 " * 12] * 1 + [f"{n} 2 3 4 5 6 7 8 9 " * 12 for n in range(40)]  # a token for two characters
        with pytest.raises(Refusal) as refusal:
            await bench.scheduler.run(lambda: Steps(bench.reranker, "q", texts), 9000, tokens=100)
        assert refusal.value.status == 429
        await first

    go(fill())
    assert bench.idle
    bench.scheduler.close()


def test_batch_size_bounds_a_requests_part_of_a_batch(bench: Bench) -> None:
    go(bench.rank("q", [f"text {n}" for n in range(10)], batch_size=3))
    assert max(map(len, bench.batches)) <= 3 and len(bench.batches) >= 4


def test_batches_are_filled_to_the_padded_budget(bench: Bench) -> None:
    texts = ["word " * n for n in range(1, 60)]
    loop = asyncio.new_event_loop()
    job = Job(loop.create_future(), None, 0)
    job.todo = list(reversed(Steps(bench.reranker, "q", texts).units))
    sizes = []
    while job.todo:
        batch = Batch()
        batch.take(job, BUDGET)
        members = [unit for units in batch.units.values() for _, unit in units if len(batch.units) == 1]
        if members:
            assert batch.padded == max(unit.size for unit in members) * len(members) <= BUDGET
        sizes.append(batch.padded)
    assert len(sizes) <= 5 and min(sizes[:-1]) > BUDGET * 0.8, "longest first, so that little is padding"
    loop.close()


def test_scoring_waits_for_nothing_that_is_not_needed(bench: Bench) -> None:
    go(bench.rank("q", ["seen before"]))
    before = len(bench.batches)
    go(bench.rank("another q", ["seen before", "seen before"]))
    assert [len(batch) for batch in bench.batches[before:]] == [1], "the query alone"
