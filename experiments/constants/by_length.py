"""python experiments/constants/by_length.py FILE.npz… [--write table.md]

How `fast`, MaxSim and `best` treat long and short documents, from the files of collect.py:
how a document's standing among the candidates goes with its length, whether the relevant
ones are longer than the others, and nDCG@10 by the length of the relevant documents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from study import BASE, Constants, Pools, arguments, run, z

Score = Callable[[Pools, int], np.ndarray]
SCORES: dict[str, Score] = {
    "fast": lambda p, i: p.row("cos", i),
    "MaxSim": lambda p, i: p.A(f"{p.own}|max", i).sum(1),
}


def scored(constants: Constants, p: Pools, i: int) -> np.ndarray:
    return p.score(constants, i)


def along(p: Pools, score: Score, relevant: bool) -> float:
    """Correlation of z(score) and z(ln(1 + Ld)), both within a query, over the candidates of all queries together, or over the relevant ones alone."""
    x, y = [], []
    for i in range(p.count):
        length, value, chosen = z(np.log1p(p.row("length", i))), z(score(p, i)), p.row("grade", i) > 0
        keep = chosen if relevant else np.ones(len(length), dtype=bool)
        x.append(length[keep])
        y.append(value[keep])
    a, b = np.concatenate(x), np.concatenate(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def thirds(p: Pools, score: Score) -> list[float]:
    """nDCG@10 of the queries whose relevant candidates are short, middling and long."""
    values = p.ndcg(lambda i: score(p, i))
    lengths = np.array([np.log1p(p.row("length", i)[p.row("grade", i) > 0]).mean() if (p.row("grade", i) > 0).any() else np.nan for i in range(p.count)])
    known = np.flatnonzero(~np.isnan(lengths))
    return [float(values[part].mean()) for part in np.array_split(known[np.argsort(lengths[known], kind="stable")], 3)]


def table(found: list[Pools]) -> str:
    lines = ["| | score | r with length, all | r, relevant | nDCG@10 short | middle | long |", "| --- |" + " --- |" * 6]
    for pools in found:
        scores = SCORES | {f"best, {prior:g}": partial(scored, replace(BASE, prior=prior)) for prior in (0.0, BASE.prior)}
        longer = np.mean(
            [z(np.log1p(pools.row("length", i)))[pools.row("grade", i) > 0].mean() for i in range(pools.count) if (pools.row("grade", i) > 0).any()]
        )
        deviation = np.mean([np.log1p(pools.row("length", i)).std() for i in range(pools.count)])
        for name, score in scores.items():
            first = f"{pools.name}: relevant {longer:+.2f}, std ln {deviation:.2f}" if name == "fast" else ""
            cells = [along(pools, score, False), along(pools, score, True)]
            lines.append(
                f"| {first} | {name} | " + " | ".join(f"{c:+.2f}" for c in cells) + " | " + " | ".join(f"{v:.3f}" for v in thirds(pools, score)) + " |"
            )
    return "\n".join(lines)


def main() -> int:
    return run("by_length", arguments(__doc__).parse_args(), table)


if __name__ == "__main__":
    sys.exit(main())
