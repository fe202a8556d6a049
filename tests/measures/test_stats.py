"""Statistical tests and intervals against first principles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rerank_lab.measures.stats import agreement, bootstrap_interval, holm, paired_randomization, paired_t

RNG = np.random.default_rng(0)
A, B = RNG.normal(0.1, 1, 40), RNG.normal(0, 1, 40)


def test_paired_t_is_paired() -> None:
    shift = RNG.normal(0, 10, 40)
    difference = A - B
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(40))
    assert paired_t(A + shift, B + shift) == pytest.approx(2 * scipy_stats.t.sf(abs(t), 39))


def test_randomization_counts_all_sign_changes_of_a_small_sample() -> None:
    d = A[:8] - B[:8]
    means = [abs(np.mean(d * signs)) for signs in itertools.product([1, -1], repeat=8)]
    assert paired_randomization(A[:8], B[:8], 0) == pytest.approx(np.mean(np.array(means) >= abs(d.mean()) - 1e-12))


def test_randomization_never_gives_zero_and_adds_one() -> None:
    better = A + 100
    p = paired_randomization(better, A + RNG.normal(0, 0.1, 40), 0)
    assert p == pytest.approx(1 / 10_000)


def test_randomization_agrees_with_signs_drawn_by_hand() -> None:
    d = A - B
    drawn = np.abs((RNG.choice([-1, 1], (20_000, 40)) * d).mean(1))
    by_hand = (1 + (drawn >= abs(d.mean())).sum()) / 20_001
    assert paired_randomization(A, B, 0) == pytest.approx(by_hand, abs=0.015)


@pytest.mark.parametrize("test", [paired_t, lambda a, b: paired_randomization(a, b, 0)])
def test_equal_systems_are_not_different(test: object) -> None:
    assert test(A, A.copy()) == 1.0  # type: ignore[operator]
    assert test(A[:1], B[:1]) == 1.0  # type: ignore[operator]


def test_a_constant_difference_gives_no_nan() -> None:
    assert paired_t(A[:4].round() + 1, A[:4].round()) is None
    assert bootstrap_interval(np.full(9, 0.25), 0) == [0.25, 0.25]
    assert bootstrap_interval(np.array([0.5]), 0) is None


def test_interval_is_the_percentile_bootstrap_of_the_mean() -> None:
    skewed = np.exp(2 * A)
    found = bootstrap_interval(skewed, 3)
    percentiles = np.percentile(RNG.choice(skewed, (20_000, 40)).mean(1), [2.5, 97.5])
    assert found == pytest.approx(percentiles.tolist(), rel=0.03)
    assert 2 * skewed.mean() - percentiles[::-1] != pytest.approx(percentiles, rel=0.1), "the basic bootstrap would differ"
    assert bootstrap_interval(skewed, 3) == found != bootstrap_interval(skewed, 4)


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_agreement_counts_a_dropped_document_in_the_overlap_alone() -> None:
    ten = {f"d{i}": 1.0 - i / 20 for i in range(12)}
    swapped = {d: ten[d] for d in ["d1", "d0", *list(ten)[2:6]]}
    found = agreement(ten, swapped)
    assert found == {"kendall_tau": pytest.approx(1 - 2 * 1 / 15), "overlap@10": 0.6, "max_score_diff": 0.0}
    assert agreement(swapped, ten) == found
    assert agreement({"a": 0.5, "b": 0.5}, {"a": 0.75, "b": 0.5}) == {"kendall_tau": 1.0, "overlap@10": 1.0, "max_score_diff": 0.25}, "places, not scores"
    last = dict([*list(ten.items())[:10], ("d11", 0.45), ("d10", 0.45)])
    assert agreement(ten, last) == {"kendall_tau": pytest.approx(1 - 2 * 1 / 66), "overlap@10": 1.0, "max_score_diff": pytest.approx(0.05)}
    assert agreement({"a": 1.0}, {"b": 1.0}) == {"kendall_tau": None, "overlap@10": 0.0, "max_score_diff": None}
    assert agreement({"a": 1.0}, {"a": 1.0})["kendall_tau"] is None, "one document has no order"
