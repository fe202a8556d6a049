"""The verdict of a report: which method to use, what it gains, what it costs, and how certain that is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

from rerank_lab.eval.results import Interval
from rerank_lab.eval.table import ALPHA, interval, p_text
from rerank_lab.measures import stats
from rerank_lab.report.blocks import Strong
from rerank_lab.report.load import ComparableRows


@dataclass(frozen=True)
class Deficit:
    """How far a row is below the one with the highest mean.

    Attributes:
        delta, ci95: difference from the highest mean (at most 0), and its 95% interval.
        p_holm: p of the randomisation test, Holm-corrected over all pairs of rows, because the same queries decided which row is highest.
    """

    delta: float
    ci95: Interval | None
    p_holm: float


@dataclass(frozen=True)
class Verdict:
    """Which row to use.

    Attributes:
        highest: label of the row with the highest mean.
        use: label of the cheapest row that cannot be told from it.
        below: label → how far it is below the highest, for all other rows.
    """

    highest: str
    use: str
    below: dict[str, Deficit]


@cache
def verdict(one: ComparableRows) -> Verdict:
    """Decides by paired tests over the queries. If methods ran here, servers are left out, since another machine timed them."""
    labels = compared(one)
    latencies = {label: one.rows[label].latency_ms for label in labels}
    cost = {label: 0.0 if latency is None else latency.p50 for label, latency in latencies.items()}
    highest = max(labels, key=lambda label: (round(one.rows[label].measures[one.primary], 12), -cost[label]))
    values = {label: one.measure(label).to_numpy() for label in labels}
    pairs = [*combinations(labels, 2)]
    corrected = dict(zip(map(frozenset, pairs), stats.holm(stats.randomized_family([values[a] - values[b] for a, b in pairs], len(pairs), one.seed))))
    change = {label: values[label] - values[highest] for label in labels if label != highest}
    below = {
        label: Deficit(float(less.mean()), stats.bootstrap_interval(less, one.seed), corrected[frozenset((label, highest))]) for label, less in change.items()
    }
    level = [label for label in labels if label == highest or below[label].p_holm >= ALPHA]
    return Verdict(highest, min(level, key=lambda label: cost[label]), below)


def compared(one: ComparableRows) -> list[str]:
    """Labels of the rows that are compared: those that were timed, without servers if methods ran here."""
    labels = [label for label, row in one.rows.items() if row.latency_ms] or list(one.rows)
    return [label for label in labels if not one.rows[label].system.remote] or labels


def frontier(one: ComparableRows) -> list[str]:
    """Labels of the compared rows that no other beats in both quality and median latency, fastest first."""
    quality = {label: one.rows[label].measures[one.primary] for label in compared(one)}
    latencies = {label: latency.p50 for label in quality if (latency := one.rows[label].latency_ms)}
    kept: list[str] = []
    for label in sorted(latencies, key=lambda label: (latencies[label], -quality[label])):
        if not kept or quality[label] > quality[kept[-1]]:
            kept.append(label)
    return kept


def sentence(one: ComparableRows, what: str = "methods") -> list[str]:
    """The finding about one collection, as parts of a paragraph; `what` is the word for its rows."""
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


def _cheaper(one: ComparableRows, found: Verdict) -> list[str]:
    """A sentence about the best method that costs less than the chosen one and also beats the baseline; empty if there is none."""
    gains = [(label, vs) for label in frontier(one) if (vs := one.rows[label].vs) and vs.p_holm < ALPHA and vs.delta > 0]
    cheaper = [(label, vs) for label, vs in gains if (ratio(one, label, found.use) or 1) < 1]
    if not cheaper:
        return []
    label, vs = cheaper[-1]
    return [" Cheaper: ", Strong(label), f" beats {vs.baseline} by {_gain(vs.delta, vs.ci95)}{_times(one, label, vs.baseline)}."]


def ratio(one: ComparableRows, label: str, other: str) -> float | None:
    """A row's median latency divided by another's. None: one was not timed, only one was timed over HTTP, or the machines differ."""
    a, b = one.rows[label], one.rows[other]
    alike = a.system.remote == b.system.remote and one.machine(label) == one.machine(other)
    return a.latency_ms.p50 / b.latency_ms.p50 if alike and a.latency_ms and b.latency_ms else None


def _times(one: ComparableRows, label: str, other: str) -> str:
    found = ratio(one, label, other)
    return "" if found is None else f" at {found:.1f} × its latency"


def _gain(value: float, ci: Interval | None, ends: str = ".3f") -> str:
    return interval(value, ci, ".3f", ends).removeprefix("0")


def _queries(count: int) -> str:
    return "one query does" if count == 1 else f"{count} queries do"
