"""A results folder as a report reads it, or a clear word on what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rerank_lab.datasets import Dataset, load_dataset
from rerank_lab.errors import UserError
from rerank_lab.journal import RESULTS
from rerank_lab.results import SCHEMA

KEYS = ("environment", "config", "dataset", "models", "candidates", "rows", "sweeps")
ROW = (
    "method", "queries", "measures", "ci95", "vs", "vs_definition", "settings", "latency_ms", "cold_latency_ms", "cold_sample", "timed_queries", "phases_ms",
    "cold_phases_ms", "docs_per_s", "peak_rss_mb", "flops_per_query", "coverage", "unjudged_share", "truncated_share", "tie_rate", "token_limit",
)  # fmt: skip
SAME = 1e-9  # means of measures over queries, summed in another order


@dataclass(frozen=True, eq=False)
class Loaded:
    """One evaluation.

    Attributes:
        folder: where it lies.
        name: as the report calls it, unlike the others'.
        stem: the same in names of files and links.
        result: results.json.
        per_query: per_query.csv, ids as text.
        scores: scores.parquet; None where it is gone.
    """

    folder: Path
    name: str
    stem: str
    result: dict[str, Any]
    per_query: pd.DataFrame
    scores: pd.DataFrame | None

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Label → row, as the evaluation had them."""
        return {row["method"]: row for row in self.result["rows"]}

    @property
    def primary(self) -> str:
        """The measure that is tested and plotted."""
        return str(self.result["config"]["measures"][0])

    @property
    def baseline(self) -> str:
        """What the others are tested against."""
        return str(self.result["config"]["baseline"])

    @property
    def seed(self) -> int:
        """Of resampling."""
        return int(self.result["config"]["seed"])

    def measure(self, label: str, name: str | None = None) -> pd.Series:
        """A method's value by query id, in the order of the judgements."""
        own = self.per_query[self.per_query["method"] == label]
        return own.set_index("query")[name or self.primary]


def load(folders: Sequence[Path]) -> list[Loaded]:
    """All of them, each under a name of its own.

    Raises:
        UserError: no folder, an interrupted run, a file missing, damaged, or of another version; which, and what to do.
    """
    if twice := [str(folder) for folder in folders if [*map(Path.resolve, folders)].count(folder.resolve()) > 1]:
        raise UserError(f"{twice[0]} is named twice")
    found = [_load(folder) for folder in folders]
    names = [_name(one) for one in found]
    for tell in (lambda one: one.folder.resolve().name, lambda one: str(one.folder)):  # apart by as little as that takes
        names = [name if names.count(name) == 1 else f"{_name(one)} ({tell(one)})" for one, name in zip(found, names)]
    stems = [anchor(name) for name in names]
    stems = [stem if stems.count(stem) == 1 else f"{stem}-{n}" for n, stem in enumerate(stems, 1)]
    return [replace(one, name=name, stem=stem) for one, name, stem in zip(found, names, stems)]


def anchor(title: str) -> str:
    """A title in names of files and links."""
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-")


def newest(root: Path) -> Path:
    """The results folder that was finished last.

    Raises:
        UserError: none is there.
    """
    done = sorted(root.glob(f"*/{RESULTS}"), key=lambda path: path.stat().st_mtime)
    if not done:
        raise UserError(f"no finished results in {root}: name a results folder, or make one: python -m rerank_lab.eval")
    return done[-1].parent


def collection(one: Loaded, given: dict[str, str]) -> Dataset:
    """The collection that was ranked, from where the run had it or as --dataset says.

    Raises:
        UserError: not to be found there, or another than the one that was ranked.
    """
    config, name = one.result["config"], one.result["dataset"]["name"]
    place = given.get(name, config["dataset"])
    dataset = load_dataset(place, config["split"])
    if dataset.hash != one.result["dataset"]["hash"]:
        raise UserError(f"{place} holds another collection than the one that was ranked (hash {dataset.hash[:16]}, not {one.result['dataset']['hash'][:16]})")
    return dataset


def _name(one: Loaded) -> str:
    data = one.result["dataset"]
    return str(data["name"]) + ("" if data["split"] == "test" else f" {data['split']}")


def _load(folder: Path) -> Loaded:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a results folder' if folder.exists() else 'no such folder'}; python -m rerank_lab.eval makes one")
    if (folder / "partial").is_dir():
        raise UserError(f"{folder} holds an interrupted run ({_done(folder / 'partial')}): finish it by the same command with --resume")
    result = _result(folder / RESULTS)
    frame = _per_query(folder / "per_query.csv", result)
    return Loaded(folder, "", "", result, frame, _scores(folder / "scores.parquet"))


def _done(partial: Path) -> str:
    counts = [f"{path.stem}: {path.read_bytes().count(bytes([10]))} queries" for path in sorted(partial.glob("*.jsonl"))]
    return ", ".join(counts[:5]) + (f" and {len(counts) - 5} more" if len(counts) > 5 else "") or "nothing ranked yet"


def _result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: no results folder, or an evaluation that never ended; python -m rerank_lab.eval makes one")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); run the evaluation again with --overwrite") from None
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        remedy = "a newer rerank_lab made it: upgrade" if newer else "run the evaluation again with --overwrite"
        raise UserError(f"{path}: schema {schema}, and this version reads schema {SCHEMA}; {remedy}")
    missing = [key for key in KEYS if key not in result]
    missing += sorted({key for row in result.get("rows", []) for key in ROW if key not in row})
    if missing or not result["rows"]:
        raise UserError(f"{path} lacks {', '.join(missing) or 'rows'}; run the evaluation again with --overwrite")
    return dict(result)


def _per_query(path: Path, result: dict[str, Any]) -> pd.DataFrame:
    names = result["config"]["measures"]
    try:
        frame = pd.read_csv(path, dtype={"query": str, "method": str}, keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: without it there are no differences by query; copy it back, or run the evaluation again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); run the evaluation again with --overwrite") from None
    missing = [name for name in ("query", "method", "latency_ms", *names) if name not in frame]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run the evaluation again with --overwrite")
    for row in result["rows"]:
        own = frame[frame["method"] == row["method"]]
        if len(own) != row["queries"]:
            raise UserError(f"{path} has {len(own)} of {row['queries']} queries of {row['method']}; run the evaluation again with --overwrite")
        if not np.allclose([own[n].mean() for n in names], [row["measures"][n] for n in names], rtol=0, atol=SAME):
            raise UserError(f"{path} and {RESULTS} are of two runs: their means of {row['method']} differ; run the evaluation again with --overwrite")
    return frame


def _scores(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); remove it, and the report leaves out which documents moved") from None
    return frame if {"method", "query", "document", "rank", "grade"} <= {*frame.columns} else None
