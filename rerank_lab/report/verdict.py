"""Which method to use, what it gains, what it costs, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from rerank_lab import stats
from rerank_lab.report.blocks import Strong
from rerank_lab.report.load import Loaded, method
from rerank_lab.results import ALPHA, interval, is_remote, p_text

SWAPS = 500  # a test of a family: a corrected p near .05 is known to about .01


@dataclass(frozen=True)
class Versus:
    """A method that is not the highest, beside the one that is.

    Attributes:
        delta, ci95: how far below (at most 0 where the other is the highest), and the 95% interval of that.
        p: randomisation test, Holm-corrected over all pairs of methods: which is highest, the same queries chose.
    """

    delta: float
    ci95: list[float] | None
    p: float


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    highest: the label of highest mean.
    use: the cheapest of those that cannot be told from it.
    below: label → how it stands beside the highest.
    """

    highest: str
    use: str
    below: dict[str, Versus]


@cache
def verdict(one: Loaded) -> Verdict:
    """By paired tests over the queries; servers are left out where methods ran here, since their time is another machine's."""
    rows = compared(one)
    labels = [row["method"] for row in rows]
    cost = {row["method"]: row["latency_ms"]["p50"] if row["latency_ms"] else 0.0 for row in rows}
    highest = max(labels, key=lambda label: (round(one.rows[label]["measures"][one.primary], 12), -cost[label]))
    values = {label: one.measure(label).to_numpy() for label in labels}
    pairs = [*combinations(labels, 2)]
    corrected = dict(zip(map(frozenset, pairs), stats.holm(randomized([values[a] - values[b] for a, b in pairs], len(pairs), one.seed))))
    change = {label: values[label] - values[highest] for label in labels if label != highest}
    below = {
        label: Versus(float(less.mean()), stats.bootstrap_interval(less, one.seed), corrected[frozenset((label, highest))]) for label, less in change.items()
    }
    level = [label for label in labels if label == highest or below[label].p >= ALPHA]
    return Verdict(highest, min(level, key=lambda label: cost[label]), below)


def compared(one: Loaded) -> list[dict[str, Any]]:
    """The rows that are weighed against each other: those timed, and without servers where methods ran here."""
    rows = [row for row in one.result["rows"] if row["latency_ms"]] or one.result["rows"]
    return [row for row in rows if not is_remote(method(row["method"]))] or rows


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


def frontier(one: Loaded) -> list[str]:
    """Labels that no other of these beats in both quality and median latency, fastest first."""
    timed = [row for row in compared(one) if row["latency_ms"]]
    kept: list[str] = []
    best = float("-inf")
    for row in sorted(timed, key=lambda row: (row["latency_ms"]["p50"], -row["measures"][one.primary])):
        if row["measures"][one.primary] > best:
            best = row["measures"][one.primary]
            kept.append(row["method"])
    return kept


def sentence(one: Loaded, what: str = "methods") -> list[str]:
    """The finding of one collection, as parts of a paragraph; `what` its rows are."""
    found, measure, use = verdict(one), one.primary, one.rows[verdict(one).use]
    vs = use["vs"]
    if vs is None:
        start = f", the baseline, has {measure} {_gain(use['measures'][measure], use['ci95'][measure])}"
    elif vs["p_holm"] < ALPHA and vs["delta"] > 0:
        start = f" beats {vs['baseline']} by {_gain(vs['delta'], vs['ci95'])} {measure}{_times(one, found.use, vs['baseline'])}"
    else:
        verb = "is worse than" if vs["p_holm"] < ALPHA else "cannot be told from"
        start = f" {verb} {vs['baseline']}: {interval(vs['delta'], vs['ci95'], '+.3f', '+.3f')} {measure}{_times(one, found.use, vs['baseline'])}"
    if found.highest != found.use:
        other = found.below[found.use]
        gap = _gain(-other.delta, other.ci95 and [-other.ci95[1], -other.ci95[0]], "+.3f")
        end = f". The highest mean is {found.highest}'s, {gap} above{_times(one, found.highest, found.use)}: "
        end += f"{_queries(use['queries'])} not tell that from chance, all pairs counted (Holm p {p_text(other.p)})."
    else:
        end = f", the highest mean of {len(found.below) + 1} {what}." if found.below else "."
    return [Strong(one.name), ": ", Strong(found.use), start + end, *_cheaper(one, found)]


def _cheaper(one: Loaded, found: Verdict) -> list[str]:
    """The best of what costs less than the chosen method and beats the baseline too."""
    gains = [label for label in frontier(one) if (vs := one.rows[label]["vs"]) and vs["p_holm"] < ALPHA and vs["delta"] > 0]
    cheaper = [label for label in gains if (ratio(one, label, found.use) or 1) < 1]
    if not cheaper:
        return []
    label = cheaper[-1]
    vs = one.rows[label]["vs"]
    return [" Cheaper: ", Strong(label), f" beats {vs['baseline']} by {_gain(vs['delta'], vs['ci95'])}{_times(one, label, vs['baseline'])}."]


def ratio(one: Loaded, label: str, other: str) -> float | None:
    """How many times as long a method takes as another, by median; None where one was not timed, or over HTTP alone, or on another machine."""
    a, b = one.rows[label], one.rows[other]
    alike = is_remote(method(label)) == is_remote(method(other)) and a.get("machine") == b.get("machine")
    return a["latency_ms"]["p50"] / b["latency_ms"]["p50"] if alike and a["latency_ms"] and b["latency_ms"] else None


def _times(one: Loaded, label: str, other: str) -> str:
    found = ratio(one, label, other)
    return "" if found is None else f" at {found:.1f} × its latency"


def _gain(value: float, ci: list[float] | None, ends: str = ".3f") -> str:
    return interval(value, ci, ".3f", ends).removeprefix("0")


def _queries(count: int) -> str:
    return "one query does" if count == 1 else f"{count} queries do"
