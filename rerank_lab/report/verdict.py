"""Which method to use, what it gains, what it costs, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from rerank_lab.eval.results import Interval
from rerank_lab.eval.table import ALPHA, interval, p_text
from rerank_lab.measures import stats
from rerank_lab.report.blocks import Strong
from rerank_lab.report.load import Evaluated

SWAPS = 500  # a test of a family: a corrected p near .05 is known to about .01


@dataclass(frozen=True)
class Below:
    """A method that is not the highest, beside the one that is.

    Attributes:
        delta, ci95: how far below (at most 0 where the other is the highest), and the 95% interval of that.
        p_holm: randomisation test, Holm-corrected over all pairs of methods: which is highest, the same queries chose.
    """

    delta: float
    ci95: Interval | None
    p_holm: float


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    highest: the label of highest mean.
    use: the cheapest of those that cannot be told from it.
    below: label → how it stands beside the highest.
    """

    highest: str
    use: str
    below: dict[str, Below]


@cache
def verdict(one: Evaluated) -> Verdict:
    """By paired tests over the queries; servers are left out where methods ran here, since their time is another machine's."""
    labels = compared(one)
    latencies = {label: one.rows[label].latency_ms for label in labels}
    cost = {label: 0.0 if latency is None else latency.p50 for label, latency in latencies.items()}
    highest = max(labels, key=lambda label: (round(one.rows[label].measures[one.primary], 12), -cost[label]))
    values = {label: one.measure(label).to_numpy() for label in labels}
    pairs = [*combinations(labels, 2)]
    corrected = dict(zip(map(frozenset, pairs), stats.holm(randomized([values[a] - values[b] for a, b in pairs], len(pairs), one.seed))))
    change = {label: values[label] - values[highest] for label in labels if label != highest}
    below = {
        label: Below(float(less.mean()), stats.bootstrap_interval(less, one.seed), corrected[frozenset((label, highest))]) for label, less in change.items()
    }
    level = [label for label in labels if label == highest or below[label].p_holm >= ALPHA]
    return Verdict(highest, min(level, key=lambda label: cost[label]), below)


def compared(one: Evaluated) -> list[str]:
    """Labels of what is weighed against each other: what was timed, and without servers where methods ran here."""
    labels = [label for label, row in one.rows.items() if row.latency_ms] or list(one.rows)
    return [label for label in labels if not one.rows[label].system.remote] or labels


def randomized(changes: Sequence[np.ndarray], family: int, seed: int) -> list[float]:
    """p of the paired randomisation test of each row of differences, with swaps enough for Holm's correction over a family.

    Args:
        changes: one a test, with one difference a query; the same queries in all.
        family: how many tests are corrected together.
        seed: of the swaps; where a test needs more than stats.RESAMPLES of them, all tests share each.
    """
    swaps = SWAPS * family
    if swaps <= stats.RESAMPLES:
        return [stats.paired_randomization(change, np.zeros(len(change)), seed) for change in changes]
    rng, columns = np.random.default_rng(seed), np.stack(changes, axis=1)
    reached, counts = np.abs(columns.sum(0)) - 1e-9, np.ones(len(changes))
    for start in range(0, swaps, 1000):
        signs = 2.0 * rng.integers(0, 2, (min(1000, swaps - start), len(columns))) - 1
        counts += (np.abs(signs @ columns) >= reached).sum(0)
    return [float(p) for p in counts / (swaps + 1)]


def frontier(one: Evaluated) -> list[str]:
    """Labels that no other of these beats in both quality and median latency, fastest first."""
    quality = {label: one.rows[label].measures[one.primary] for label in compared(one)}
    latencies = {label: latency.p50 for label in quality if (latency := one.rows[label].latency_ms)}
    kept: list[str] = []
    for label in sorted(latencies, key=lambda label: (latencies[label], -quality[label])):
        if not kept or quality[label] > quality[kept[-1]]:
            kept.append(label)
    return kept


def sentence(one: Evaluated, what: str = "methods") -> list[str]:
    """The finding of one collection, as parts of a paragraph; `what` its rows are."""
    found, measure, use = verdict(one), one.primary, one.rows[verdict(one).use]
    vs = use.vs
    if vs is None:
        start = f", the baseline, has {measure} {_gain(use.measures[measure], use.ci95[measure])}"
    elif vs.p_holm < ALPHA and vs.delta > 0:
        start = f" beats {vs.baseline} by {_gain(vs.delta, vs.ci95)} {measure}{_times(one, found.use, vs.baseline)}"
    else:
        verb = "is worse than" if vs.p_holm < ALPHA else "cannot be told from"
        start = f" {verb} {vs.baseline}: {interval(vs.delta, vs.ci95, '+.3f', '+.3f')} {measure}{_times(one, found.use, vs.baseline)}"
    if found.highest != found.use:
        other = found.below[found.use]
        gap = _gain(-other.delta, other.ci95 and [-other.ci95[1], -other.ci95[0]], "+.3f")
        end = f". The highest mean is {found.highest}'s, {gap} above{_times(one, found.highest, found.use)}: "
        end += f"{_queries(use.queries)} not tell that from chance, all pairs counted (Holm p {p_text(other.p_holm)})."
    else:
        end = f", the highest mean of {len(found.below) + 1} {what}." if found.below else "."
    return [Strong(one.name), ": ", Strong(found.use), start + end, *_cheaper(one, found)]


def _cheaper(one: Evaluated, found: Verdict) -> list[str]:
    """The best of what costs less than the chosen method and beats the baseline too."""
    gains = [(label, vs) for label in frontier(one) if (vs := one.rows[label].vs) and vs.p_holm < ALPHA and vs.delta > 0]
    cheaper = [(label, vs) for label, vs in gains if (ratio(one, label, found.use) or 1) < 1]
    if not cheaper:
        return []
    label, vs = cheaper[-1]
    return [" Cheaper: ", Strong(label), f" beats {vs.baseline} by {_gain(vs.delta, vs.ci95)}{_times(one, label, vs.baseline)}."]


def ratio(one: Evaluated, label: str, other: str) -> float | None:
    """How many times as long a method takes as another, by median; None where one was not timed, or over HTTP alone, or on another machine."""
    a, b = one.rows[label], one.rows[other]
    alike = a.system.remote == b.system.remote and one.machine(label) == one.machine(other)
    return a.latency_ms.p50 / b.latency_ms.p50 if alike and a.latency_ms and b.latency_ms else None


def _times(one: Evaluated, label: str, other: str) -> str:
    found = ratio(one, label, other)
    return "" if found is None else f" at {found:.1f} × its latency"


def _gain(value: float, ci: Interval | None, ends: str = ".3f") -> str:
    return interval(value, ci, ".3f", ends).removeprefix("0")


def _queries(count: int) -> str:
    return "one query does" if count == 1 else f"{count} queries do"
