"""python experiments/training/choose_weights.py RESULTS…

nDCG@10 of optimal and best+cross over their weights, on train queries.
Each RESULTS is a folder that rerank_lab.eval wrote with --methods
fast,standard,best:length=0 on a development split, as train_cross_encoder.py leaves them
in its --work folder. Nothing is ranked again: sums are made from its scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rerank_kernels import zscore
from rerank_lab.cli import path_of
from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.runs import Ranked, Run, order
from rerank_lab.errors import UserError
from rerank_lab.measures.quality import measure_run

OPTIMAL = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
BEST = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
KEEP = 50
BEST_ALONE = "best:length=0"  # its scores are z(z(cos) + 2 z(a)), which token_sum takes apart


def z(values: Any) -> np.ndarray:
    result: np.ndarray = zscore(torch.tensor(np.asarray(values, dtype=np.float32))).numpy()
    return result


def token_sum(cosine: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Recovers z(cos) + 2 z(a) from the scores of best, which are its z-scores: s·z(best), with the s at which s·z(best) − z(cos) has a deviation of 2."""
    if not best.any():
        return cosine
    r = float((cosine * best).mean())
    total: np.ndarray = (r + np.sqrt(r * r + 3)) * best
    return total


def scores(pool: pd.DataFrame, cosine_weight: float | None, cross_weight: float | None) -> pd.Series:
    """Scores of one query's documents, under a weight of optimal (cosine_weight) or of best+cross (cross_weight)."""
    if cosine_weight is not None:
        kept = pool.sort_values("fast", ascending=False, kind="stable").head(KEEP)
        return pd.Series(z(kept["standard"]) + cosine_weight * z(kept["fast"]), kept.index)
    return pd.Series(token_sum(z(pool["fast"]), z(pool["best"])) + (cross_weight or 0) * z(pool["standard"]), pool.index)


def sweep(folder: Path) -> dict[str, float]:
    """Weight → nDCG@10 over the queries of one results folder."""
    try:
        config = json.loads((folder / "results.json").read_text())["config"]
        table = pd.read_parquet(folder / "scores.parquet")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no results of rerank_lab.eval ({error})") from None
    missing = {"fast", "standard", BEST_ALONE} - set(table["method"])
    if missing:
        raise UserError(f"{folder}: needs the methods fast, standard and {BEST_ALONE}; {', '.join(sorted(missing))} missing")
    if config["limit_queries"]:
        raise UserError(f"{folder}: made with --limit-queries; all queries are needed")
    qrels = load_dataset(config["dataset"], config["split"]).qrels
    wide = table.pivot(index=["query", "document"], columns="method", values="score").rename(columns={BEST_ALONE: "best"}).reset_index("document")
    settings = [(f"optimal {w:g}", w, None) for w in OPTIMAL] + [(f"best+cross {w:g}", None, w) for w in BEST]
    pools = {q: pool.set_index("document") for q, pool in wide.groupby(level="query")}
    found = {label: measured({q: ranked(pool[label]) for q, pool in pools.items()}, qrels) for label in ("fast", "standard")}
    for label, cosine_weight, cross_weight in settings:
        found[label] = measured({q: ranked(scores(pool, cosine_weight, cross_weight)) for q, pool in pools.items()}, qrels)
    return found


def ranked(values: pd.Series) -> Ranked:
    places = order(values.to_numpy())
    return Ranked([values.index[i] for i in places], values.to_numpy()[places])


def measured(run: Run, qrels: dict[str, dict[str, int]]) -> float:
    return float(measure_run(run, qrels, ["nDCG@10"])["nDCG@10"].mean())


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", type=path_of, nargs="+", metavar="RESULTS")
    try:
        folders = p.parse_args().results
        table = pd.DataFrame(
            {json.loads((f / "results.json").read_text())["dataset"]["name"] if (f / "results.json").is_file() else f.name: sweep(f) for f in folders}
        )
    except UserError as error:
        print(f"choose_weights: error: {error}", file=sys.stderr)
        return 2
    table["mean"] = table.mean(axis=1)
    print(table.round(4).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
