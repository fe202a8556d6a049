"""The clock and its phases."""

from __future__ import annotations

import time

import pytest

from rerank_lab import Reranker
from rerank_lab.timing import PHASES, Clock


def test_a_phase_within_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("rerank_lab.timing.time.perf_counter", lambda: now)
    clock = Clock()
    with clock.phase("encode"):
        now += 20
        with clock.phase("tokenise"):
            now += 5
        now += 1
    now += 100
    with pytest.raises(KeyError), clock.phase("score"):
        now += 3
        raise KeyError
    assert clock.seconds == {"encode": 21, "tokenise": 5, "score": 3}


@pytest.mark.parametrize("method", ["fast", "standard", "best"])
def test_phases_of_a_ranking_are_parts_of_its_time(method: str) -> None:
    reranker = Reranker(method=method, device="cpu")
    texts = [f"Sort the values along axis {i} of a data frame, or by the given key." for i in range(60)]
    reranker.score("warm up", texts[:2])
    start = time.perf_counter()
    seconds = reranker.score("order rows by a column", texts).seconds
    whole = time.perf_counter() - start
    assert seconds.keys() == {*PHASES} and min(seconds.values()) > 0
    assert seconds["encode"] > seconds["tokenise"], "sixty new documents"
    assert whole / 2 < sum(seconds.values()) <= whole
