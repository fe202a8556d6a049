"""A results folder as a report reads it, or a clear word on what is missing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from rerank_lab.datasets.dataset import Dataset
from rerank_lab.datasets.load import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.eval.journal import RESULTS
from rerank_lab.eval.results import Results, Row, read

GRID = "grid.json"  # in the folder of a grid of evaluations
SAME = 1e-9  # means of measures over queries, summed in another order


class Evaluated(Protocol):
    """Rows that ranked the same queries: those of an evaluation, or those of all cells of a grid."""

    @property
    def name(self) -> str:
        """As the report calls them, unlike the others'."""

    @property
    def stem(self) -> str:
        """The same in names of files and links."""

    @property
    def rows(self) -> Mapping[str, Row]:
        """Label → row. In a grid the row's own label is the start of it, and the cell's values follow in brackets."""

    @property
    def primary(self) -> str:
        """The measure that is tested and plotted."""

    @property
    def baseline(self) -> str:
        """Label of what the others are tested against."""

    @property
    def seed(self) -> int:
        """Of resampling."""

    def __hash__(self) -> int: ...

    def measure(self, label: str) -> pd.Series:
        """A row's value of the first measure by query id, in the order of the judgements."""

    def machine(self, label: str) -> str:
        """What a row was timed on: times are compared within one machine alone."""


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
    result: Results
    per_query: pd.DataFrame
    scores: pd.DataFrame | None

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Label → row, as the evaluation had them."""
        return {row.label: row for row in self.result.rows}

    @property
    def primary(self) -> str:
        """The measure that is tested and plotted."""
        return self.result.primary

    @property
    def baseline(self) -> str:
        """What the others are tested against."""
        return self.result.config.baseline

    @property
    def seed(self) -> int:
        """Of resampling."""
        return self.result.config.seed

    def measure(self, label: str, name: str | None = None) -> pd.Series:
        """A method's value by query id, in the order of the judgements; of the first measure, or of the one named."""
        own = self.per_query[self.per_query["method"] == label]
        return own.set_index("query")[name or self.primary]

    def machine(self, label: str) -> str:
        """One machine timed all rows."""
        return ""


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
    """The results folder that was finished last, or the grid that it is of.

    Raises:
        UserError: none is there.
    """
    cells = (path for path in root.glob(f"*/*/{RESULTS}") if is_grid(path.parent.parent))
    done = sorted([*root.glob(f"*/{RESULTS}"), *cells], key=lambda path: path.stat().st_mtime)
    if not done:
        raise UserError(f"no finished results in {root}: name a results folder, or make one: python -m rerank_lab.eval")
    folder = done[-1].parent
    return folder.parent if is_grid(folder.parent) else folder


def is_grid(folder: Path) -> bool:
    """Whether a folder holds the cells of a grid."""
    return (folder / GRID).is_file()


def collection(one: Loaded, given: dict[str, str]) -> Dataset:
    """The collection that was ranked, from where the run had it or as --dataset says.

    Raises:
        UserError: not to be found there, or another than the one that was ranked.
    """
    config, ranked = one.result.config, one.result.dataset
    place = given.get(ranked.name, config.dataset)
    dataset = load_dataset(place, config.split)
    if dataset.hash != ranked.hash:
        raise UserError(f"{place} holds another collection than the one that was ranked (hash {dataset.hash[:16]}, not {ranked.hash[:16]})")
    return dataset


def _name(one: Loaded) -> str:
    data = one.result.dataset
    return data.name + ("" if data.split == "test" else f" {data.split}")


def _load(folder: Path) -> Loaded:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a results folder' if folder.exists() else 'no such folder'}; python -m rerank_lab.eval makes one")
    if (folder / "partial").is_dir():
        raise UserError(f"{folder} holds an interrupted run ({_done(folder / 'partial')}): finish it by the same command with --resume")
    result = read(folder / RESULTS)
    frame = _per_query(folder / "per_query.csv", result)
    scores = _scores(folder / "scores.parquet", result, frame)
    for name, digest in result.files.items():
        if (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise UserError(f"{folder / name} is not the one that {RESULTS} came with; copy it back, or run the evaluation again with --overwrite")
    return Loaded(folder, "", "", result, frame, scores)


def _done(partial: Path) -> str:
    counts = [f"{path.stem}: {path.read_bytes().count(bytes([10]))} queries" for path in sorted(partial.glob("*.jsonl"))]
    return ", ".join(counts[:5]) + (f" and {len(counts) - 5} more" if len(counts) > 5 else "") or "nothing ranked yet"


def _per_query(path: Path, result: Results) -> pd.DataFrame:
    names = result.config.measures
    try:
        frame = pd.read_csv(path, dtype={"query": str, "method": str}, keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: without it there are no differences by query; copy it back, or run the evaluation again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); run the evaluation again with --overwrite") from None
    missing = [name for name in ("query", "method", "candidates", "latency_ms", *names) if name not in frame]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run the evaluation again with --overwrite")
    texts = [name for name in ("latency_ms", *names) if not pd.api.types.is_numeric_dtype(frame[name])]
    if texts or frame.duplicated(["method", "query"]).any():
        raise UserError(f"{path} holds {f'no numbers in {texts[0]}' if texts else 'a query twice'}; run the evaluation again with --overwrite")
    base = next(row.measures[result.primary] for row in result.rows if row.label == result.config.baseline)
    for row in result.rows:
        own = frame[frame["method"] == row.label]
        if len(own) != row.queries:
            raise UserError(f"{path} has {len(own)} of {row.queries} queries of {row.label}; run the evaluation again with --overwrite")
        if not np.allclose([own[n].mean() for n in names], [row.measures[n] for n in names], rtol=0, atol=SAME):
            raise UserError(f"{path} and {RESULTS} are of two runs: their means of {row.label} differ; run the evaluation again with --overwrite")
        if row.vs and not np.isclose(row.vs.delta, row.measures[result.primary] - base, atol=SAME):
            raise UserError(f"{path.with_name(RESULTS)} does not agree with itself on {row.label}; run the evaluation again with --overwrite")
    return frame


def _scores(path: Path, result: Results, per_query: pd.DataFrame) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); remove it, and the report leaves out which documents moved") from None
    if not {"method", "query", "document", "rank", "grade", "first_stage"} <= {*frame.columns}:
        raise UserError(f"{path} lacks columns; remove it, and the report leaves out which documents moved")
    ranked = {(label, q) for label, q, n in zip(per_query["method"], per_query["query"], per_query["candidates"]) if n}
    if {*zip(frame["method"], frame["query"])} != ranked:
        raise UserError(f"{path} and {RESULTS} are of two runs; remove it, and the report leaves out which documents moved")
    return frame
