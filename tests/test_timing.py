"""Where time goes."""

from __future__ import annotations

import time

import pytest

from rerank_lab import Reranker
from rerank_lab.timing import PHASES, Clock


def test_a_phase_within_another_is_not_counted_twice() -> None:
    clock = Clock()
    with clock.phase("encode"):
        time.sleep(0.02)
        with clock.phase("tokenise"):
            time.sleep(0.05)
        time.sleep(0.01)
    with pytest.raises(KeyError), clock.phase("score"):
        raise KeyError
    assert clock.seconds["encode"] == pytest.approx(0.03, abs=0.015) and clock.seconds["tokenise"] == pytest.approx(0.05, abs=0.015)
    assert sum(clock.seconds.values()) < 0.11


@pytest.mark.parametrize("method", ["fast", "standard", "best"])
def test_phases_of_a_ranking_add_up_to_nearly_all_of_it(method: str) -> None:
    reranker = Reranker(method=method, device="cpu")
    texts = [f"Sort the values along axis {i} of a data frame, or by the given key." for i in range(60)]
    reranker.score("warm up", texts[:2])
    start = time.perf_counter()
    seconds = reranker.score("order rows by a column", texts).seconds
    whole = time.perf_counter() - start
    assert seconds.keys() == {*PHASES} and min(seconds.values()) > 0
    assert 0.8 * whole < sum(seconds.values()) <= whole
