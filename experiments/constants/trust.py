"""python experiments/constants/trust.py FILE.npz… [--write table.md]

How much to trust the cross-encoder: nDCG@10 of best+cross − best under fixed weights and
under rules that need no judgement, from files that collect_logits.py has completed. A
rule gives each query a weight of z(logit) from the two orders or the logits alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats
from study import Constants, Pools, z

from rerank_lab.cli import path_of

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


RULES: dict[str, Weight] = {f"weight {w:g}": lambda b, x, w=w: w for w in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6)}  # type: ignore[misc]
RULES |= {f"3 where overlap@10 ≥ {t:g}, else {low:g}": lambda b, x, t=t, low=low: 3 if overlap(b, x) >= t else low for t in (0.4, 0.5, 0.6, 0.7) for low in (0, 0.5)}  # type: ignore[misc]
RULES |= {f"{w:g} · overlap@10": lambda b, x, w=w: w * overlap(b, x) for w in (2, 3, 4)}  # type: ignore[misc]
RULES |= {f"3 where r ≥ {t:g}": lambda b, x, t=t: 3 * (correlation(b, x) >= t) for t in (0.6, 0.7, 0.75, 0.8, 0.85, 0.9)}  # type: ignore[misc]
RULES |= {f"3 where the largest sigmoid ≥ {t:g}": lambda b, x, t=t: 3 * (sigmoid(x.max()) >= t) for t in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)}  # type: ignore[misc]
RULES |= {f"3 where std of logits ≥ {t:g}": lambda b, x, t=t: 3 * (x.std() >= t) for t in (1.0, 1.5, 2.0, 2.5, 3.0)}  # type: ignore[misc]
RULES |= {f"3 where the gap ≥ {t:g}": lambda b, x, t=t: 3 * (gap(x) >= t) for t in (2.5, 3, 3.5, 4)}  # type: ignore[misc]
RULES |= {f"3 where both name the same first, else {low:g}": lambda b, x, low=low: 3 if b.argmax() == x.argmax() else low for low in (0, 0.5, 1)}  # type: ignore[misc]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", type=path_of)
    p.add_argument("--soft", default="σ/1.5")
    p.add_argument("--write", type=path_of)
    options = p.parse_args()
    pools = [Pools(Path(f)) for f in options.files]
    constants = Constants(soft=options.soft)
    lines = ["| | " + " | ".join(p.name for p in pools) + " | least | mean |", "| --- |" + " --- |" * (len(pools) + 2)]
    base = [p.best(constants) for p in pools]
    bs = [[p.score(constants, i) for i in range(p.count)] for p in pools]
    xs = [[p.row("logit", i) for i in range(p.count)] for p in pools]
    for name, function in (("best", None), ("standard", "x")):
        means = [p.best(constants).mean() if function is None else p.ndcg(lambda i, x=x: x[i]).mean() for p, x in zip(pools, xs)]
        lines.append(f"| {name} | " + " | ".join(f"{m:.4f}" for m in means) + f" | | {np.mean(means):.4f} |")
    for label, value in (("overlap@10", overlap), ("r", correlation), ("gap", lambda b, x: gap(x)), ("std of logits", lambda b, x: x.std()), ("largest sigmoid", lambda b, x: sigmoid(x.max()))):  # fmt: skip
        means = [np.mean([value(b, x) for b, x in zip(bb, xx)]) for bb, xx in zip(bs, xs)]
        lines.append(f"| *{label}* | " + " | ".join(f"*{m:.3f}*" for m in means) + " | | |")
    for name, rule in RULES.items():
        cells, deltas = [], []
        for p, bb, xx, values in zip(pools, bs, xs, base):
            found = p.ndcg(lambda i, bb=bb, xx=xx: bb[i] + rule(bb[i], xx[i]) * z(xx[i]))
            deltas.append((found - values).mean())
            sure = not np.array_equal(found, values) and stats.ttest_rel(found, values).pvalue < 0.01
            cells.append(f"**{deltas[-1]:+.4f}**" if sure else f"{deltas[-1]:+.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {min(deltas):+.4f} | {np.mean(deltas):+.4f} |")
    print("\n".join(lines))
    if options.write:
        options.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
