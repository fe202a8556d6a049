"""python experiments/constants/trust.py FILE.npz… [--write table.md]

How much to trust the cross-encoder: nDCG@10 of best+cross − best under fixed weights and
under rules that need no judgement, from files that collect_logits.py has completed. A
rule gives each query a weight of z(logit) from the two orders or the logits alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy import stats
from study import BASE, Pools, arguments, run, z

from rerank_lab.errors import UserError

Weight = Callable[[np.ndarray, np.ndarray], float]  # b of best and logits of one query's documents → weight of z(logit)


def overlap(b: np.ndarray, logit: np.ndarray, k: int = 10) -> float:
    return len(set(np.argsort(-b)[:k]) & set(np.argsort(-logit)[:k])) / k


def correlation(b: np.ndarray, logit: np.ndarray) -> float:
    return float(np.corrcoef(b, logit)[0, 1])


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.asarray(x))))


def gap(logit: np.ndarray) -> float:
    """How far the largest logit stands above the rest, in their deviations."""
    return float((logit.max() - logit.mean()) / max(logit.std(), 1e-6))


def fixed(weight: float) -> Weight:
    return lambda b, x: weight


def where(weight: float, low: float, trusted: Callable[[np.ndarray, np.ndarray], bool]) -> Weight:
    return lambda b, x: weight if trusted(b, x) else low


def proportional(weight: float) -> Weight:
    return lambda b, x: weight * overlap(b, x)


def least(measure: Callable[[np.ndarray, np.ndarray], float], value: float) -> Callable[[np.ndarray, np.ndarray], bool]:
    return lambda b, x: measure(b, x) >= value


RULES: dict[str, Weight] = {f"weight {w:g}": fixed(w) for w in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6)}
RULES |= {f"3 · overlap@10 · {w:g}": proportional(3 * w) for w in (0.5, 1, 1.5)}
MEASURES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], tuple[float, ...]]] = {
    "overlap@10": (overlap, (0.4, 0.5, 0.6, 0.7)),
    "r": (correlation, (0.6, 0.7, 0.75, 0.8, 0.85, 0.9)),
    "largest sigmoid": (lambda b, x: float(sigmoid(x.max())), (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)),
    "std of logits": (lambda b, x: float(x.std()), (1, 1.5, 2, 2.5, 3)),
    "gap": (lambda b, x: gap(x), (2.5, 3, 3.5, 4, 5)),
    "same first": (lambda b, x: float(b.argmax() == x.argmax()), (1,)),
}
for measure, (function, bounds) in MEASURES.items():
    for bound in bounds:
        RULES |= {f"3 where {measure} ≥ {bound:g}, else {low:g}": where(3, low, least(function, bound)) for low in (0, 0.5)}


def summed(rule: Weight, bs: list[np.ndarray], xs: list[np.ndarray], i: int) -> np.ndarray:
    """best+cross of query i under a rule."""
    return bs[i] + rule(bs[i], xs[i]) * z(xs[i])


def table(pools: list[Pools]) -> str:
    if lacking := [p.name for p in pools if "logit" not in p.arrays]:
        raise UserError(f"{', '.join(lacking)}: no logits; collect_logits.py adds them")
    lines = ["| | " + " | ".join(p.name for p in pools) + " | least | mean |", "| --- |" + " --- |" * (len(pools) + 2)]
    base = [p.best(BASE) for p in pools]
    bs = [[p.score(BASE, i) for i in range(p.count)] for p in pools]
    xs = [[p.row("logit", i) for i in range(p.count)] for p in pools]
    standard = [p.ndcg(partial(p.row, "logit")) for p in pools]
    for name, values in (("best", base), ("standard", standard)):
        means = [v.mean() for v in values]
        lines.append(f"| {name} | " + " | ".join(f"{m:.4f}" for m in means) + f" | | {np.mean(means):.4f} |")
    for label, (value, _) in MEASURES.items():
        means = [np.mean([value(b, x) for b, x in zip(bb, xx)]) for bb, xx in zip(bs, xs)]
        lines.append(f"| *{label}* | " + " | ".join(f"*{m:.3f}*" for m in means) + " | | |")
    for name, rule in RULES.items():
        cells, deltas = [], []
        for p, bb, xx, own in zip(pools, bs, xs, base):
            found = p.ndcg(partial(summed, rule, bb, xx))
            deltas.append((found - own).mean())
            sure = not np.array_equal(found, own) and stats.ttest_rel(found, own).pvalue < 0.01
            cells.append(f"**{deltas[-1]:+.4f}**" if sure else f"{deltas[-1]:+.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {min(deltas):+.4f} | {np.mean(deltas):+.4f} |")
    return "\n".join(lines)


def main() -> int:
    return run("trust", arguments(__doc__).parse_args(), table)


if __name__ == "__main__":
    sys.exit(main())
