"""Reads results folders for a report, or says clearly what is missing."""

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
from rerank_lab.eval.grid import GRID
from rerank_lab.eval.journal import RESULTS
from rerank_lab.eval.results import Results, Row, read

MEAN_TOLERANCE = 1e-9  # means over queries differ by this much if they are summed in another order


class ComparableRows(Protocol):
    """Rows that ranked the same queries: those of one evaluation, or those of all cells of a grid on one collection."""

    @property
    def name(self) -> str:
        """Name of the collection; unique in the report."""

    @property
    def stem(self) -> str:
        """The name as part of file names and links."""

    @property
    def rows(self) -> Mapping[str, Row]:
        """Label → row. In a grid, the label is the row's own, followed by the cell's values in brackets."""

    @property
    def primary(self) -> str:
        """The measure that is tested and plotted."""

    @property
    def baseline(self) -> str:
        """Label of the row that the others are tested against."""

    @property
    def seed(self) -> int:
        """Seed of resampling."""

    def __hash__(self) -> int: ...

    def measure(self, label: str) -> pd.Series:
        """A row's first measure by query id, in the order of the judgements."""

    def machine(self, label: str) -> str:
        """The machine that timed a row. Times may only be compared within one machine."""


@dataclass(frozen=True, eq=False)
class ResultsFolder:
    """One evaluation, as read from its results folder.

    Attributes:
        folder: the results folder.
        name: name of the collection; unique in the report.
        stem: the name as part of file names and links.
        result: content of results.json.
        per_query: content of per_query.csv, with ids as text.
        scores: content of scores.parquet; None: the file is missing.
    """

    folder: Path
    name: str
    stem: str
    result: Results
    per_query: pd.DataFrame
    scores: pd.DataFrame | None

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Label → row, in the order of the evaluation."""
        return {row.label: row for row in self.result.rows}

    @property
    def primary(self) -> str:
        """The measure that is tested and plotted."""
        return self.result.primary

    @property
    def baseline(self) -> str:
        """Label of the row that the others are tested against."""
        return self.result.config.baseline

    @property
    def seed(self) -> int:
        """Seed of resampling."""
        return self.result.config.seed

    def measure(self, label: str, name: str | None = None) -> pd.Series:
        """A row's values by query id, in the order of the judgements: of the measure `name`, or of the first measure."""
        own = self.per_query[self.per_query["method"] == label]
        return own.set_index("query")[name or self.primary]

    def machine(self, label: str) -> str:
        """Always "": one machine timed all rows."""
        return ""


def load(folders: Sequence[Path]) -> list[ResultsFolder]:
    """Reads results folders and gives each a unique name.

    Raises:
        UserError: there is no such folder, it holds an interrupted run, or a file is missing, damaged or of another version.
            The message names it and says what to do.
    """
    if twice := [str(folder) for folder in folders if [*map(Path.resolve, folders)].count(folder.resolve()) > 1]:
        raise UserError(f"{twice[0]} is named twice")
    found = [_load(folder) for folder in folders]
    names = [_name(one) for one in found]
    for tell in (lambda one: one.folder.resolve().name, lambda one: str(one.folder)):  # equal names get the folder's name, or else its path
        names = [name if names.count(name) == 1 else f"{_name(one)} ({tell(one)})" for one, name in zip(found, names)]
    stems = [anchor(name) for name in names]
    stems = [stem if stems.count(stem) == 1 else f"{stem}-{n}" for n, stem in enumerate(stems, 1)]
    return [replace(one, name=name, stem=stem) for one, name, stem in zip(found, names, stems)]


def anchor(title: str) -> str:
    """A title as part of file names and links."""
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-")


def newest(root: Path) -> Path:
    """The results folder that was finished last, or the grid's folder if it is a cell of a grid.

    Raises:
        UserError: there are no finished results.
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


def collection(one: ResultsFolder, given: dict[str, str]) -> Dataset:
    """Loads the collection that was ranked.

    Args:
        one: the evaluation.
        given: name of a collection → its place now, from --dataset. Other collections are where the evaluation had them.

    Raises:
        UserError: the collection is not there, or it is not the one that was ranked.
    """
    config, ranked = one.result.config, one.result.dataset
    place = given.get(ranked.name, config.dataset)
    dataset = load_dataset(place, config.split)
    if dataset.hash != ranked.hash:
        raise UserError(f"{place} holds another collection than the one that was ranked (hash {dataset.hash[:16]}, not {ranked.hash[:16]})")
    return dataset


def _name(one: ResultsFolder) -> str:
    data = one.result.dataset
    return data.name + ("" if data.split == "test" else f" {data.split}")


def _load(folder: Path) -> ResultsFolder:
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
    return ResultsFolder(folder, "", "", result, frame, scores)


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
        if not np.allclose([own[n].mean() for n in names], [row.measures[n] for n in names], rtol=0, atol=MEAN_TOLERANCE):
            raise UserError(f"{path} and {RESULTS} are of two runs: their means of {row.label} differ; run the evaluation again with --overwrite")
        if row.vs and not np.isclose(row.vs.delta, row.measures[result.primary] - base, atol=MEAN_TOLERANCE):
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
