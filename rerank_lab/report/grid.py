"""Reads a grid of evaluations for its page: the cells of each collection, with their rows joined. Or it says clearly what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from rerank_lab.errors import UserError
from rerank_lab.eval.grid import GRID, GRID_SCHEMA
from rerank_lab.eval.results import Row, Versus
from rerank_lab.files import DecodeError, Json, decode, expanded, read_versioned
from rerank_lab.measures import stats
from rerank_lab.report.compare import timed_on
from rerank_lab.report.load import ResultsFolder, anchor, load

REMEDY = "restore it, or run the grid again (python -m rerank_lab.eval --grid)"


@dataclass(frozen=True)
class ListedCell:
    """A cell as grid.json lists it: the name of its folder, and axis → value."""

    name: str
    values: dict[str, Json]


@dataclass(frozen=True)
class GridFile:
    """The content of grid.json: axis → its values, and all cells."""

    axes: dict[str, list[Json]]
    cells: list[ListedCell]


@dataclass(frozen=True)
class FinishedCell(ListedCell):
    """A cell that is finished, with its results."""

    one: ResultsFolder


@dataclass(frozen=True)
class CellRow:
    """A row of a cell.

    Attributes:
        row: the row, but tested against the baseline of the grid.
        values: axis → name of the cell's value.
        machine: what distinguishes the machine that timed the row from the others; "": there are no others.
        cell: the cell that the row belongs to.
    """

    row: Row
    values: dict[str, str]
    machine: str
    cell: FinishedCell


@dataclass(frozen=True, eq=False)
class JoinedRows:
    """Rows of several cells on one collection, in the form of one evaluation (ComparableRows).

    Attributes:
        name, stem, primary, baseline, seed: as in ComparableRows.
        cell_rows: label → row; the label is the row's own, followed by the cell's values in brackets.
        quality: label → the first measure by query id.
    """

    name: str
    stem: str
    primary: str
    baseline: str
    seed: int
    cell_rows: dict[str, CellRow]
    quality: dict[str, pd.Series]

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Label → row."""
        return {label: cell_row.row for label, cell_row in self.cell_rows.items()}

    def measure(self, label: str) -> pd.Series:
        """A row's first measure by query id."""
        return self.quality[label]

    def machine(self, label: str) -> str:
        """The machine that timed a row."""
        return self.cell_rows[label].machine


@dataclass(frozen=True, eq=False)
class CollectionCells:
    """All cells of one collection.

    Attributes:
        whole: their rows, tested against one baseline.
        views: machine → the rows that it timed. Times may only be compared within one view.
        cells: in the grid's order.
    """

    whole: JoinedRows
    views: dict[str, JoinedRows]
    cells: list[FinishedCell]


@dataclass(frozen=True)
class Grid:
    """The finished cells of a grid.

    Attributes:
        axes: option → its values as JSON → their short names, in order; only options that vary within a collection.
        collections: one for each collection and set of judged queries.
        unfinished: names of the cells that are left out.
        repeated: whether several cells have the same row.
    """

    axes: dict[str, dict[str, str]]
    collections: list[CollectionCells]
    unfinished: list[str]
    repeated: bool

    @property
    def cells(self) -> list[FinishedCell]:
        """All finished cells."""
        return [cell for one in self.collections for cell in one.cells]


def read(folder: Path) -> Grid:
    """Reads the grid in a folder.

    Raises:
        UserError: grid.json or a cell is damaged, a cell is not the one that grid.json describes, no cell is finished,
            or the cells' first measures differ.
    """
    about = _described(folder / GRID)
    names = [cell.name for cell in about.cells]
    unfinished = [name for name in names if not (folder / name).exists() or (folder / name / "partial").is_dir()]
    if len(unfinished) == len(names):
        raise UserError(f"{folder}: none of the grid's {len(names)} cells is finished; go on with its command and --resume")
    cells = [FinishedCell(cell.name, cell.values, load([folder / cell.name])[0]) for cell in about.cells if cell.name not in unfinished]
    for cell in cells:
        if cell.one.primary != cells[0].one.primary:
            raise UserError(
                f"{folder}: {cells[0].name} is measured by {cells[0].one.primary} and {cell.name} by {cell.one.primary}; "
                "one page needs one first measure: run the grid again with --measures"
            )
        _check(folder, cell)
    groups: dict[Any, list[FinishedCell]] = {}
    for cell in cells:
        data = cell.one.result.dataset
        groups.setdefault((data.name, data.split, data.hash, frozenset(cell.one.per_query["query"])), []).append(cell)
    axes = {
        axis: _named(axis, values)
        for axis, values in about.axes.items()
        if axis != "dataset"
        and not any(isinstance(value, (list, dict)) for value in values)
        and any(len({json.dumps(cell.values[axis]) for cell in group}) > 1 for group in groups.values())
    }
    collections = [_collected(title, group, axes, _machines(cells)) for title, group in zip(_titles([*groups.values()]), groups.values())]
    rows = sum(len(cell.one.rows) for cell in cells)
    return Grid(axes, collections, unfinished, rows > sum(len(one.whole.rows) for one in collections))


def _described(path: Path) -> GridFile:
    value = read_versioned(path, GRID_SCHEMA, REMEDY)
    try:
        about = decode(GridFile, value)
        for problem in _inconsistent(about):
            raise DecodeError(problem)
    except DecodeError as problem:
        raise UserError(f"{path}: {problem}; {REMEDY}") from None
    return about


def _inconsistent(about: GridFile) -> Iterator[str]:
    axes, names = about.axes, [cell.name for cell in about.cells]
    if not names:
        yield "it has no cells"
    if twice := [name for name in names if names.count(name) > 1]:
        yield f"the cell {twice[0]} stands there twice"
    for cell in about.cells:
        if cell.name in ("", "..") or Path(cell.name).name != cell.name:
            yield f"the cell {cell.name!r} names no folder in it"
        if {*cell.values} != {*axes} or any(json.dumps(value) not in map(json.dumps, axes[axis]) for axis, value in cell.values.items()):
            yield f"the values of the cell {cell.name} are not those of its axes"


def _check(folder: Path, cell: FinishedCell) -> None:
    """Checks that a cell's results have the options that grid.json says. Collections and lists may be written differently."""
    for axis, value in cell.values.items():
        own = cell.one.result.config.options.get(axis, value)
        if axis != "dataset" and isinstance(value, (str, int, float)) and own not in (value, expanded(value) if isinstance(value, str) else value):
            raise UserError(f"{folder / cell.name} is not the cell that {GRID} describes: its {axis} is {own!r}, not {value!r}; run it again with --overwrite")


def _named(axis: str, values: Sequence[Json]) -> dict[str, str]:
    """The values of an axis, as JSON → a name as short as possible that differs from the others. An empty text is called none, as in the cells' names."""
    empty = "none" if "none" not in values else "''"
    texts = [empty if value == "" else value for value in values]
    full = [(f"{axis}" if value else f"no {axis}") if isinstance(value, bool) else value if isinstance(value, str) else json.dumps(value) for value in texts]
    last = [text.rstrip("/").rpartition("/")[2] for text in full]
    brief = [text if len(text) <= 16 else f"{text[:8]}…{text[-7:]}" for text in last]
    shown = next(texts for texts in (brief, last, full) if len({*texts}) == len({*full}))
    return dict(zip(map(json.dumps, values), shown))


def _machines(cells: Sequence[FinishedCell]) -> dict[tuple[str, ...], str]:
    """Machine of a cell (see _machine) → the facts that distinguish it from the others."""
    found = {_machine(cell.one): timed_on(cell.one) for cell in cells}
    telling = [key for key in next(iter(found.values())) if len({env[key] for env in found.values()}) > 1]
    return {own: ", ".join(f"{key} {env[key]}" for key in telling) for own, env in found.items()}


def _machine(one: ResultsFolder) -> tuple[str, ...]:
    return tuple(timed_on(one).values())


def _titles(groups: Sequence[Sequence[FinishedCell]]) -> list[str]:
    """A unique title for each collection: its name, with queries, hash or first cell added if they are needed."""
    firsts = [group[0] for group in groups]
    names = [first.one.name for first in firsts]
    queries = [f"{first.one.result.rows[0].queries} queries" for first in firsts]
    hashes = [first.one.result.dataset.hash[:8] for first in firsts]
    for tells in (queries, hashes, [first.name for first in firsts]):
        names = [name if [*map(anchor, names)].count(anchor(name)) == 1 else f"{first.one.name} ({tell})" for first, name, tell in zip(firsts, names, tells)]
    return names


def _collected(title: str, cells: list[FinishedCell], axes: Mapping[str, Mapping[str, str]], machines: Mapping[tuple[str, ...], str]) -> CollectionCells:
    first, baseline = cells[0].one, ""
    found: dict[str, CellRow] = {}
    values: dict[str, pd.Series] = {}
    for cell in cells:
        own = {axis: names[json.dumps(cell.values[axis])] for axis, names in axes.items()}
        for name, row in cell.one.rows.items():
            label = f"{name} ({', '.join(own.values())})" if own else name
            if name == first.baseline:
                baseline = baseline or label
            if label not in found:
                found[label] = CellRow(row, own, machines[_machine(cell.one)], cell)
                values[label] = cell.one.measure(name)[first.measure(first.baseline).index]
    tested = {label: stats.paired(values[label].to_numpy(), values[baseline].to_numpy(), first.seed) for label in found if label != baseline}
    corrected = stats.holm([test["p_randomization"] for test in tested.values()])
    vs = {label: Versus(baseline=baseline, measure=first.primary, p_holm=p, **test) for (label, test), p in zip(tested.items(), corrected)}
    cell_rows = {label: replace(own, row=replace(own.row, vs=vs.get(label))) for label, own in found.items()}
    whole = JoinedRows(title, anchor(title), first.primary, baseline, first.seed, cell_rows, values)
    views = {}
    for machine in dict.fromkeys(own.machine for own in cell_rows.values()):
        name = f"{title}, {machine}" if machine else title
        views[machine] = replace(whole, name=name, stem=anchor(name), cell_rows={label: own for label, own in cell_rows.items() if own.machine == machine})
    return CollectionCells(whole, views, cells)
