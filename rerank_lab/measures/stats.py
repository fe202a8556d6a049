"""Is the difference real: paired tests, bootstrap intervals and Holm's correction, by scipy and statsmodels; and do two rankings agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

RESAMPLES = 9999
# Resamples at once: bounds the memory to about 100 × queries × 8 bytes a step.
BATCH = 100


class Paired(TypedDict):
    """One system against another, query by query.

    Attributes:
        delta, ci95: mean difference and its 95% interval; None for a single query.
        p_t, p_randomization: of the paired t-test (None: undefined) and of the randomisation test.
        wins, ties, losses: queries.
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
        values: one a query; of a measure, or of differences between two methods.
        seed: of the resampling.
    """
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return [float(values[0])] * 2
    result = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=BATCH, method="percentile", rng=np.random.default_rng(seed))
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def paired_t(a: np.ndarray, b: np.ndarray) -> float | None:
    """Two-sided p of the paired t-test; 1 where no query differs, None where all differ by the same and t is undefined."""
    if len(a) < 2 or np.array_equal(a, b):
        return 1.0
    if np.ptp(a - b) == 0:
        return None
    return float(stats.ttest_rel(a, b).pvalue)


def paired_randomization(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """Two-sided p of the paired randomisation test: how often the absolute mean difference is reached when labels swap.

    (count + 1) / (n + 1) over n = 9,999 random swaps; where there are no more than that many distinct ones (13 queries or fewer), all are counted.
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
    """a against b, query by query: mean difference with its interval, both tests, and how many queries each way."""
    return {
        "delta": float((a - b).mean()), "ci95": bootstrap_interval(a - b, seed), "p_t": paired_t(a, b), "p_randomization": paired_randomization(a, b, seed),
        "wins": int((a > b).sum()), "ties": int((a == b).sum()), "losses": int((a < b).sum()),
    }  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction across methods."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def agreement(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[str, float | None]:
    """How far two rankings of one query's documents agree.

    Args:
        a, b: document → shown score, best first.

    Returns:
        kendall_tau: of the two orders (places, not scores, so that nothing ties), over the documents that both ranked: one that
            either dropped counts neither for nor against. None below two of them.
        overlap@10: share of the first 10 that both have there; of as many as the longer ranking has, where those are fewer. A dropped
            document is in no top 10. None where neither ranks anything.
        max_score_diff: largest absolute difference of a document's two scores, over the documents that both ranked; None without any.
    """
    places = {document: place for place, document in enumerate(b)}
    both = [document for document in a if document in places]
    depth = min(10, max(len(a), len(b)))
    return {
        "kendall_tau": float(stats.kendalltau(range(len(both)), [places[d] for d in both]).statistic) if len(both) > 1 else None,
        "overlap@10": len({*[*a][:depth]} & {*[*b][:depth]}) / depth if depth else None,
        "max_score_diff": max((abs(a[d] - b[d]) for d in both), default=None),
    }
