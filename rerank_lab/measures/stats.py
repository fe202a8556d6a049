"""Tests whether a difference between two systems is real (paired tests, bootstrap intervals, Holm's correction), and how far two rankings agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

RESAMPLES = 9999
SWAPS = 500  # for each test of a family; they give a corrected p near .05 to about .01
BATCH = 100  # resamples at once: about 100 × queries × 8 bytes of memory


class Paired(TypedDict):
    """System a compared with system b, query by query.

    Attributes:
        delta: mean of a − b.
        ci95: 95% bootstrap interval of delta; None for a single query.
        p_t: p-value of the paired t-test; None: undefined.
        p_randomization: p-value of the paired randomisation test.
        wins, ties, losses: number of queries on which a is better, equal or worse.
    """

    delta: float
    ci95: list[float] | None
    p_t: float | None
    p_randomization: float
    wins: int
    ties: int
    losses: int


def bootstrap_interval(values: np.ndarray, seed: int) -> list[float] | None:
    """95% percentile bootstrap interval of the mean over queries (9,999 resamples); None for a single query.

    Args:
        values: one for each query: of a measure, or of its differences between two systems.
        seed: of the resampling.

    Returns:
        [low, high].
    """
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return [float(values[0])] * 2
    result = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=BATCH, method="percentile", rng=np.random.default_rng(seed))
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def paired_t(a: np.ndarray, b: np.ndarray) -> float | None:
    """Two-sided p-value of the paired t-test; 1 if no query differs; None if all queries differ by the same amount, where t is undefined."""
    if len(a) < 2 or np.array_equal(a, b):
        return 1.0
    if np.ptp(a - b) == 0:
        return None
    return float(stats.ttest_rel(a, b).pvalue)


def paired_randomization(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the paired randomisation test: how often swapping the systems' labels reaches the absolute mean difference.

    p = (count + 1) / (n + 1) over n = 9,999 random swaps. With 13 queries or fewer there are at most 9,999 distinct swaps, and p is
    exact: all of them are counted.
    """
    if len(a) < 2 or np.array_equal(a, b):
        return 1.0
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.abs(np.mean(x - y, axis=axis)),
        alternative="greater",
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def paired(a: np.ndarray, b: np.ndarray, seed: int) -> Paired:
    """Compares a with b, query by query.

    Args:
        a, b: the measure's value for each query, in the same order.
        seed: of the resampling.
    """
    return {
        "delta": float((a - b).mean()), "ci95": bootstrap_interval(a - b, seed), "p_t": paired_t(a, b), "p_randomization": paired_randomization(a, b, seed),
        "wins": int((a > b).sum()), "ties": int((a == b).sum()), "losses": int((a < b).sum()),
    }  # fmt: skip


def randomized_family(changes: Sequence[np.ndarray], family: int, seed: int) -> list[float]:
    """p-values of paired randomisation tests, with enough swaps for Holm's correction over a family of tests.

    Args:
        changes: for each test, one difference for each query. All tests have the same queries.
        family: how many tests are corrected together.
        seed: of the swaps. If more than RESAMPLES swaps are needed, all tests use the same ones.
    """
    swaps = SWAPS * family
    if swaps <= RESAMPLES:
        return [paired_randomization(change, np.zeros(len(change)), seed) for change in changes]
    rng, columns = np.random.default_rng(seed), np.stack(changes, axis=1)
    reached, counts = np.abs(columns.sum(0)) - 1e-9, np.ones(len(changes))
    for start in range(0, swaps, 1000):
        signs = 2.0 * rng.integers(0, 2, (min(1000, swaps - start), len(columns))) - 1
        counts += (np.abs(signs @ columns) >= reached).sum(0)
    return [float(p) for p in counts / (swaps + 1)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values of several comparisons, in the same order."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def agreement(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[str, float | None]:
    """How far two rankings of one query's documents agree.

    Args:
        a, b: document → shown score, best first. Documents that stage 1 dropped are absent.

    Returns:
        kendall_tau: Kendall's tau of the two orders over the documents in both rankings. It compares ranks, which have no ties.
            None if fewer than two documents are in both.
        overlap@10: share of documents that both have among their first 10. If the longer ranking has fewer than 10, its length
            replaces 10. None if both are empty.
        max_score_diff: largest absolute difference between a document's two scores, over the documents in both; None if there are none.
    """
    places = {document: place for place, document in enumerate(b)}
    both = [document for document in a if document in places]
    depth = min(10, max(len(a), len(b)))
    return {
        "kendall_tau": float(stats.kendalltau(range(len(both)), [places[d] for d in both]).statistic) if len(both) > 1 else None,
        "overlap@10": len({*[*a][:depth]} & {*[*b][:depth]}) / depth if depth else None,
        "max_score_diff": max((abs(a[d] - b[d]) for d in both), default=None),
    }
