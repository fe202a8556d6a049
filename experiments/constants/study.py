"""python experiments/constants/study.py FILE.npz… [--only tau,length] [--write table.md]

nDCG@10 of `best` under other constants, one at a time, from the files of collect.py: a
row is a change, a column a model on a collection. A difference from the first row of its
part that is more than noise (paired t-test, p < .01) is in bold. Nothing is encoded again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import stats

from rerank_lab.cli import path_of
from rerank_lab.errors import UserError
from rerank_lab.files import write_atomically
from rerank_lab.methods.best import SPREAD_IN_TAUS, Best

TOP = 100
Contrast = Callable[[np.ndarray], np.ndarray]
CONTRASTS: dict[str, Contrast] = {
    "max − mean": lambda A: A.max(0) - A.mean(0),
    "uniform": lambda A: np.ones(A.shape[1]),
    "√(max − mean)": lambda A: np.sqrt(np.maximum(A.max(0) - A.mean(0), 0)),
    "(max − mean)²": lambda A: (A.max(0) - A.mean(0)) ** 2,
    "max − median": lambda A: A.max(0) - np.median(A, 0),
    "std": lambda A: A.std(0),
    "second − mean": lambda A: np.sort(A, 0)[-2] - A.mean(0),
}


@dataclass(frozen=True)
class Constants:
    """One set of constants.

    Attributes:
        way: the projection; "": the model's own.
        soft: the temperature: a number, "σ/2" (σ: the standard deviation of the similarities), "max", or "auto", the collected one
            that is nearest to the default.
        contrast: how query tokens are weighed.
        alpha: weight of the token term.
        maxsim: weight of z(Σ_i max_j s_ij), beside the cosine.
        cosine: weight of z(cos).
        length: weight of z(ln(1 + Ld)).
        prior: λ in b + λ ln(1 + Ld).
        growth: β in A + β σ √(2 ln(1 + Ld)).
    """

    way: str = ""
    soft: str = "auto"
    contrast: str = "max − mean"
    alpha: float = Best.alpha
    maxsim: float = 0.0
    cosine: float = 1.0
    length: float = 0.0
    prior: float = Best.length
    growth: float = 0.0


BASE = Constants()
PARTS: dict[str, dict[str, Constants]] = {
    "tau": {name: Constants(soft=name) for name in ("auto", "0.1", "0.05", "0.025", "σ/1", "σ/1.5", "σ/2", "σ/2.5", "σ/3", "σ/4", "max", "lme σ/2", "lme σ/3")},
    "projection": {"own": BASE} | {f"{way}, {soft}": Constants(way=way, soft=soft) for way in ("I", "128", "3..130", "mean", "mean, 2", "without 2") for soft in ("σ/2", "σ/3")},
    "alpha": {f"alpha {value:g}": Constants(alpha=value) for value in (2, 0.5, 1, 1.5, 3, 4, 8)},
    "contrast": {name: Constants(contrast=name) for name in CONTRASTS},
    "partner": {
        "cosine": BASE,
        "maxsim": Constants(maxsim=1, cosine=0),
        "neither": Constants(cosine=0),
        "both": Constants(maxsim=1),
        "both, ½": Constants(maxsim=0.5, cosine=0.5),
    },
    "length": {f"λ = {BASE.prior:+g}": BASE} | {f"z(ln L) {value:+g}": Constants(length=value, prior=0) for value in (-1, -0.5, -0.25, 0.25, 0.5, 1)}
    | {f"λ = {value:+g}": Constants(prior=value) for value in (-0.5, -0.25, 0, 0.1, 0.3, 0.4, 0.5, 0.75, 1)}
    | {f"growth {value:+g}": Constants(growth=value, prior=0) for value in (-0.5, -0.25, 0.25, 0.5)},
}  # fmt: skip


def z(x: np.ndarray) -> np.ndarray:
    spread = x.std()
    return (x - x.mean()) / spread if spread > 1e-9 else np.zeros_like(x)


class Pools:
    """What collect.py kept of one model on one collection."""

    def __init__(self, path: Path):
        try:
            with np.load(path) as file:
                self.facts = json.loads(str(file["facts"]))
                self.lengths = file["lengths"]
                self.arrays = {name: file[name] for name in file.files if name not in ("facts", "lengths")}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: no file of collect.py ({error})") from None
        self.name = path.stem
        self.count = len(self.lengths)
        self.own = "V" if "V|max" in self.arrays else "I"
        starts = np.concatenate([[0], np.cumsum(self.lengths)]) * TOP
        self.spans = [slice(a, b) for a, b in pairwise(starts.tolist())]
        self.ideal = self.arrays["ideal"].reshape(self.count, 10)

    def row(self, name: str, i: int) -> np.ndarray:
        found: np.ndarray = self.arrays[name][i * TOP : (i + 1) * TOP].astype(np.float32)
        return found

    def A(self, name: str, i: int) -> np.ndarray:
        found: np.ndarray = self.arrays[name][self.spans[i]].reshape(TOP, -1).astype(np.float32)
        return found

    def temperature(self, way: str, name: str) -> float:
        """tau of a collected temperature."""
        return self.facts["sigma"][way] / float(name[2:]) if name.startswith("σ/") else float(name)

    def soft(self, way: str, c: Constants) -> str:
        """The name of the collected temperature."""
        if c.soft != "auto":
            return c.soft
        names: list[str] = [name.split("|")[1] for name in self.arrays if name.startswith(f"{way}|") and not name.endswith("max") and "lme" not in name]
        wanted = self.facts["spread"] / SPREAD_IN_TAUS
        return min(names, key=lambda name: abs(np.log(self.temperature(way, name) / wanted)))

    def score(self, c: Constants, i: int) -> np.ndarray:
        """b of query i's TOP documents."""
        way = c.way or self.own
        A, length = self.A(f"{way}|{self.soft(way, c)}", i), self.row("length", i)
        if c.growth:
            A = A + c.growth * self.facts["sigma"][way] * np.sqrt(2 * np.log(1 + length))[:, None]
        w = CONTRASTS[c.contrast](A)
        a = A @ w / w.sum() if w.sum() > 0 else A.mean(1)
        b = c.alpha * z(a)
        if c.cosine:
            b = b + c.cosine * z(self.row("cos", i))
        if c.maxsim:
            b = b + c.maxsim * z(self.A(f"{way}|max", i).sum(1))
        if c.length:
            b = b + c.length * z(np.log(1 + length))
        total: np.ndarray = b + c.prior * np.log1p(length)
        return total

    def ndcg(self, scores: Callable[[int], np.ndarray]) -> np.ndarray:
        """nDCG@10 of each query."""
        discount = 1 / np.log2(np.arange(2, 12))
        found = np.zeros(self.count)
        for i in range(self.count):
            order = np.argsort(-scores(i), kind="stable")[:10]
            found[i] = self.row("grade", i)[order] @ discount / (self.ideal[i] @ discount)
        return found

    def fast(self) -> np.ndarray:
        return self.ndcg(lambda i: self.row("cos", i))

    def best(self, c: Constants) -> np.ndarray:
        return self.ndcg(lambda i: self.score(c, i))


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a script that makes tables of files."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=path_of, help="files of collect.py")
    parser.add_argument("--write", type=path_of, help="where the tables go too")
    return parser


def run(name: str, options: argparse.Namespace, table: Callable[[list[Pools]], str]) -> int:
    """Prints and writes what `table` makes of the files. Returns the exit code."""
    try:
        text = table([Pools(path) for path in options.files])
        if options.write:
            write_atomically(options.write, text + "\n")
    except (UserError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def part(title: str, rows: Mapping[str, Constants], pools: list[Pools]) -> str:
    lines = [f"### {title}", "", "| | " + " | ".join(p.name for p in pools) + " | mean |", "| --- |" + " --- |" * (len(pools) + 1)]
    first: dict[str, np.ndarray] = {}
    fast = [p.fast().mean() for p in pools]
    lines.append("| fast | " + " | ".join(f"{v:.4f}" for v in fast) + f" | {np.mean(fast):.4f} |")
    for name, constants in rows.items():
        cells, means = [], []
        for p in pools:
            way = constants.way or p.own
            if f"{way}|{p.soft(way, constants)}" not in p.arrays:
                cells.append("")
                continue
            values = p.best(constants)
            means.append(values.mean())
            base = first.setdefault(p.name, values)
            noise = np.array_equal(base, values) or stats.ttest_rel(values, base).pvalue >= 0.01
            cells.append(f"{values.mean():.4f}" if noise else f"**{values.mean():.4f}**")
        lines.append(f"| {name} | " + " | ".join(cells) + (f" | {np.mean(means):.4f} |" if len(means) == len(pools) else " | |"))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", help="parts, comma-separated (default: all)")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(PARTS)}")
    return run("study", options, lambda pools: "\n".join(part(name, PARTS[name], pools) for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
