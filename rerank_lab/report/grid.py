"""A grid of evaluations as one report: the cells of a collection side by side, and what each axis of the grid changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from rerank_lab import stats
from rerank_lab.errors import UserError
from rerank_lab.files import expanded
from rerank_lab.report import content, figures
from rerank_lab.report.blocks import Block, Cell, Code, Details, Plot, Quoted, Row, Section, Strong, Table, Text
from rerank_lab.report.compare import flat, timed_on
from rerank_lab.report.content import number
from rerank_lab.report.load import GRID, Loaded, anchor, load, misfits
from rerank_lab.report.verdict import frontier, randomized, ratio, sentence, verdict
from rerank_lab.results import ALPHA, head, interval, p_text

SCHEMA = 1
SHAPE = {"axes": {"*": list}, "cells": [{"name": str, "values": {}}]}
REMEDY = "restore it, or run the grid again (python -m rerank_lab.eval --grid)"


@dataclass(frozen=True)
class Done:
    """A finished cell: its name, its values by axis, its results."""

    name: str
    values: dict[str, Any]
    one: Loaded


@dataclass(frozen=True, eq=False)
class Collected:
    """All cells of one collection.

    Attributes:
        whole: their rows as one evaluation, each under its method and values, tested against one baseline.
        views: machine → the rows that were timed on it, which alone may be compared by time.
        cells: in the grid's order.
    """

    whole: Loaded
    views: dict[str, Loaded]
    cells: list[Done]


@dataclass(frozen=True)
class Grid:
    """What is finished of a grid.

    Attributes:
        axes: option → names of its values, in order; only those that vary within a collection.
        collections: one a collection and set of judged queries.
        unfinished: names of cells that are left out.
        repeated: whether several cells held the same row.
    """

    axes: dict[str, dict[str, str]]
    collections: list[Collected]
    unfinished: list[str]
    repeated: bool

    @property
    def cells(self) -> list[Done]:
        """All that are finished."""
        return [cell for one in self.collections for cell in one.cells]


def read(folder: Path) -> Grid:
    """The grid in a folder.

    Raises:
        UserError: grid.json is damaged, a cell is or does not fit it, none is finished, or their first measures differ.
    """
    about = _described(folder / GRID)
    names = [cell["name"] for cell in about["cells"]]
    unfinished = [name for name in names if not (folder / name).exists() or (folder / name / "partial").is_dir()]
    if len(unfinished) == len(names):
        raise UserError(f"{folder}: none of the grid's {len(names)} cells is finished; go on with its command and --resume")
    cells = [Done(cell["name"], cell["values"], load([folder / cell["name"]])[0]) for cell in about["cells"] if cell["name"] not in unfinished]
    for cell in cells:
        if cell.one.primary != cells[0].one.primary:
            raise UserError(
                f"{folder}: {cells[0].name} is measured by {cells[0].one.primary} and {cell.name} by {cell.one.primary}; "
                "one page needs one first measure: run the grid again with --measures"
            )
        _check(folder, cell)
    groups: dict[Any, list[Done]] = {}
    for cell in cells:
        data = cell.one.result["dataset"]
        groups.setdefault((data["name"], data["split"], data["hash"], frozenset(cell.one.per_query["query"])), []).append(cell)
    axes = {
        axis: _named(axis, values)
        for axis, values in about["axes"].items()
        if axis != "dataset"
        and not any(isinstance(value, (list, dict)) for value in values)
        and any(len({json.dumps(cell.values[axis]) for cell in group}) > 1 for group in groups.values())
    }
    collections = [_collected(folder, title, group, axes, _machines(cells)) for title, group in zip(_titles([*groups.values()]), groups.values())]
    rows = sum(len(cell.one.rows) for cell in cells)
    return Grid(axes, collections, unfinished, rows > sum(len(one.whole.rows) for one in collections))


def _described(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); {REMEDY}") from None
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != SCHEMA or type(schema) is not int:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise UserError(f"{path}: schema {schema!r}, and this version reads schema {SCHEMA}; {'a newer rerank_lab made it: upgrade' if newer else REMEDY}")
    if problem := next(misfits(about, SHAPE, ""), None) or next(_inconsistent(about), None):
        raise UserError(f"{path}: {problem}; {REMEDY}")
    return dict(about)


def _inconsistent(about: dict[str, Any]) -> Iterator[str]:
    axes, names = about["axes"], [cell["name"] for cell in about["cells"]]
    if not names:
        yield "it has no cells"
    if twice := [name for name in names if names.count(name) > 1]:
        yield f"the cell {twice[0]} stands there twice"
    for cell in about["cells"]:
        if cell["name"] in ("", "..") or Path(cell["name"]).name != cell["name"]:
            yield f"the cell {cell['name']!r} names no folder in it"
        if {*cell["values"]} != {*axes} or any(json.dumps(value) not in map(json.dumps, axes[axis]) for axis, value in cell["values"].items()):
            yield f"the values of the cell {cell['name']} are not those of its axes"


def _check(folder: Path, cell: Done) -> None:
    """Whether a cell's results are those that the grid says; what a collection or a list is called may differ."""
    for axis, value in cell.values.items():
        own = cell.one.result["config"].get(axis, value)
        if axis != "dataset" and isinstance(value, (str, int, float)) and own not in (value, expanded(value) if isinstance(value, str) else value):
            raise UserError(f"{folder / cell.name} is not the cell that {GRID} describes: its {axis} is {own!r}, not {value!r}; run it again with --overwrite")


def _named(axis: str, values: Sequence[Any]) -> dict[str, str]:
    """An axis' values, as JSON → as few words as tell them apart."""
    full = [(f"{axis}" if value else f"no {axis}") if isinstance(value, bool) else value if isinstance(value, str) else json.dumps(value) for value in values]
    last = [text.rstrip("/").rpartition("/")[2] for text in full]
    brief = [text if len(text) <= 16 else f"{text[:8]}…{text[-7:]}" for text in last]
    shown = next(texts for texts in (brief, last, full) if len({*texts}) == len({*full}))
    return dict(zip(map(json.dumps, values), shown))


def _machines(cells: Sequence[Done]) -> dict[tuple[Any, ...], str]:
    """What the cells ran on → what tells it from the others."""
    found = {_machine(cell.one): timed_on(cell.one) for cell in cells}
    telling = [key for key in next(iter(found.values())) if len({env[key] for env in found.values()}) > 1]
    return {own: ", ".join(f"{key} {env[key]}" for key in telling) for own, env in found.items()}


def _machine(one: Loaded) -> tuple[Any, ...]:
    return tuple(timed_on(one).values())


def _titles(groups: Sequence[Sequence[Done]]) -> list[str]:
    """Each collection's name, apart from the others' by as little as that takes."""
    firsts = [group[0] for group in groups]
    names = [first.one.name for first in firsts]
    queries = [f"{first.one.result['rows'][0]['queries']} queries" for first in firsts]
    hashes = [str(first.one.result["dataset"]["hash"])[:8] for first in firsts]
    for tells in (queries, hashes, [first.name for first in firsts]):
        names = [name if [*map(anchor, names)].count(anchor(name)) == 1 else f"{first.one.name} ({tell})" for first, name, tell in zip(firsts, names, tells)]
    return names


def _collected(folder: Path, title: str, cells: list[Done], axes: Mapping[str, Mapping[str, str]], machines: Mapping[tuple[Any, ...], str]) -> Collected:
    first = cells[0].one
    rows: dict[str, dict[str, Any]] = {}
    values: dict[str, pd.Series] = {}
    baseline = ""
    for cell in cells:
        own = {axis: names[json.dumps(cell.values[axis])] for axis, names in axes.items()}
        for name, row in cell.one.rows.items():
            label = f"{name} ({', '.join(own.values())})" if own else name
            if name == first.baseline:
                baseline = baseline or label
            if label not in rows:
                rows[label] = row | {"method": label, "name": name, "values": own, "machine": machines[_machine(cell.one)], "cell": cell}
                values[label] = cell.one.measure(name)[first.measure(first.baseline).index]
    for label, row in rows.items():
        vs = stats.paired(values[label].to_numpy(), values[baseline].to_numpy(), first.seed)
        row["vs"] = None if label == baseline else {"baseline": baseline, "measure": first.primary, **vs}
    tested = [row["vs"] for row in rows.values() if row["vs"]]
    for vs, p in zip(tested, stats.holm([vs["p_randomization"] for vs in tested])):
        vs["p_holm"] = p
    frame = pd.concat([pd.DataFrame({"query": own.index, "method": label, first.primary: own.to_numpy()}) for label, own in values.items()])
    config = first.result["config"] | {"measures": [first.primary], "baseline": baseline, "methods": [*rows]}
    whole = Loaded(folder, title, anchor(title), first.result | {"config": config, "rows": [*rows.values()]}, frame, None)
    views = {}
    for machine in dict.fromkeys(row["machine"] for row in rows.values()):
        name = f"{title}, {machine}" if machine else title
        own_rows = [row for row in rows.values() if row["machine"] == machine]
        views[machine] = replace(whole, name=name, stem=anchor(name), result=whole.result | {"rows": own_rows})
    return Collected(whole, views, cells)


def page(grid: Grid, made_by: str) -> Section:
    """The report of a grid, and the command that made it."""
    wholes, cells = [one.whole for one in grid.collections], grid.cells
    blocks: list[Block] = [Text(finding(one), item=len(wholes) > 1) for one in grid.collections]
    blocks += [Text([line], item=True) for line in _remarks(grid)]
    blocks.append(across(grid))
    views = [view for one in grid.collections for view in one.views.values() if any(row["latency_ms"] for row in view.result["rows"])]
    blocks.append(Row([Plot(f"pareto-{view.stem}", figures.pareto(view), figures.described(view)) for view in views]))
    blocks += content.footing([cell.one for cell in cells], made_by)
    for axis in grid.axes:
        blocks.append(Section(f"What {axis} changes", 2, _axis(grid, axis)))
    for one in grid.collections:
        blocks.append(Section(one.whole.name, 2, _collection(one, [*grid.axes])))
    listed = Details(f"{len(cells)} folders and the commands that make them again", [block for cell in cells for block in _cell(cell, cells[0])])
    blocks.append(Section("Cells", 2, [listed]))
    over = f": a grid over {', '.join(grid.axes)}" if grid.axes else f": a grid of {len(cells)}"
    return Section(content.title(wholes) + over, 1, blocks)


def finding(one: Collected) -> list[str]:
    """The sentence of one collection; where its rows were timed on several machines, the cheapest of each."""
    whole = one.whole
    if len(one.views) == 1:
        return sentence(whole, "rows")
    found, highest = verdict(whole), whole.rows[verdict(whole).highest]
    mean = interval(highest["measures"][whole.primary], highest["ci95"][whole.primary])
    parts = [Strong(whole.name), ": the highest mean is ", Strong(found.highest), f"'s, {whole.primary} {mean}, of {len(found.below) + 1} rows"]
    for machine, view in one.views.items():
        level = [label for label in view.rows if label == found.highest or (label in found.below and found.below[label].p >= ALPHA)]
        if not level:
            parts.append(f"; with {machine} all are told from it")
            continue
        use = min(level, key=lambda label: (view.rows[label]["latency_ms"] or {"p50": 0.0})["p50"])
        below = found.below.get(use)
        gap = f", {interval(below.delta, below.ci95, '+.3f', '+.3f')} (Holm p {p_text(below.p)})" if below else ""
        parts += [f"; with {machine} the cheapest that cannot be told from it is ", Strong(use), gap]
    return [*parts, "."]


def _remarks(grid: Grid) -> Iterator[str]:
    if grid.unfinished:
        yield unfinished(grid)
    if len({machine for one in grid.collections for machine in one.views}) > 1:
        yield "Cells were timed on different machines or settings of one: times are compared within each alone, in plots of their own, and there is no ratio across."
    if grid.axes:
        yield f"A row is a method ({', '.join(grid.axes)}). A collection's Δ and × are against the baseline of its first cell."
    if (rows := max(len(one.whole.rows) for one in grid.collections)) > figures.CROWD:
        yield f"All pairs of {rows} rows are {rows * (rows - 1) // 2} tests, so that it takes more to be told from the highest mean than from the baseline."
    if grid.repeated:
        yield "A row that several cells hold stands once, from the first of them."


def unfinished(grid: Grid) -> str:
    """Which cells are left out."""
    return f"Not finished and left out, {len(grid.unfinished)} of {len(grid.cells) + len(grid.unfinished)} cells: {'; '.join(grid.unfinished)}."


def across(grid: Grid) -> Table:
    """Methods and values down, collections across: quality, and latency as a multiple of the baseline's."""
    wholes = [one.whole for one in grid.collections]
    rows = {label: row for whole in wholes for label, row in whole.rows.items()}
    cells = [
        [
            *_values(row),
            *(_mean(whole, label) for whole in wholes),
            *(number(ratio(whole, label, whole.baseline) if label in whole.rows else None, ".2f") for whole in wholes),
        ]
        for label, row in rows.items()
    ]
    return Table(["method", *grid.axes, *(f"{whole.name}, {whole.primary}" for whole in wholes), *(f"{whole.name}, × latency" for whole in wholes)], cells)


def _values(row: Mapping[str, Any], *without: str) -> list[Cell]:
    return [Cell(row["name"]), *(Cell(value) for axis, value in row["values"].items() if axis not in without)]


def _mean(whole: Loaded, label: str) -> Cell:
    row = whole.rows.get(label)
    return Cell("-") if row is None else Cell(interval(row["measures"][whole.primary], row["ci95"][whole.primary]), row["measures"][whole.primary])


def _axis(grid: Grid, axis: str) -> list[Block]:
    """What one option changes with all else equal, pair by pair."""
    pairs = [
        (one.whole, a, b, (one.whole.measure(b["method"]) - one.whole.measure(a["method"])).to_numpy())
        for one in grid.collections
        for a, b in _pairs(one.whole, axis, [*grid.axes[axis].values()])
    ]
    p_values = list[float]()
    for one in grid.collections:
        if own := [change for whole, *_, change in pairs if whole is one.whole]:
            p_values += randomized(own, len(pairs), one.whole.seed)
    two_stages = not all(_same_candidates(a, b) for _, a, b, _ in pairs)
    rows, counted = list[list[Cell]](), dict[str, list[tuple[float, float, float | None]]]()
    for (whole, a, b, change), p in zip(pairs, stats.holm(p_values)):
        delta, step, times = float(change.mean()), f"{a['values'][axis]} → {b['values'][axis]}", ratio(whole, b["method"], a["method"])
        counted.setdefault(step, []).append((delta, p, times))
        rows.append([
            Cell(whole.name), *_values(a, axis), Cell(step), Cell(interval(delta, stats.bootstrap_interval(change, whole.seed), "+.4f", "+.4f"), delta),
            Cell(p_text(p), p), Cell(f"{(change > 0).sum()}/{(change == 0).sum()}/{(change < 0).sum()}", float((change > 0).sum())), number(times, ".2f"),
            *([Cell("same" if _same_candidates(a, b) else "other")] if two_stages else []),
        ])  # fmt: skip
    columns = ["collection", "method", *(name for name in grid.axes if name != axis), "from → to", f"Δ {grid.collections[0].whole.primary} [95% CI]", "p, Holm"]
    columns += ["won/tied/lost", "× latency", *(["candidates"] if two_stages else [])]
    said = [Text([Strong(step), f": {_counted(found)}."], item=True) for step, found in counted.items()]
    stages = " Where candidates are other ones, the first stage changed too, and the difference is of both." if two_stages else ""
    text = f"All else equal, paired by query; p from a randomisation test, Holm-corrected over the {len(rows)} rows of the table.{stages}"
    return [*said, Text([text]), Table(columns, rows)]


def _same_candidates(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return bool(a["cell"].one.result["candidates"]["hash"] == b["cell"].one.result["candidates"]["hash"])


def _pairs(whole: Loaded, axis: str, order: Sequence[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows that differ in one axis alone, the earlier value first."""
    alike: dict[Any, list[dict[str, Any]]] = {}
    for row in whole.result["rows"]:
        alike.setdefault((row["name"], *(value for name, value in row["values"].items() if name != axis)), []).append(row)
    for rows in alike.values():
        yield from combinations(sorted(rows, key=lambda row: order.index(row["values"][axis])), 2)


def _counted(found: Sequence[tuple[float, float, float | None]]) -> str:
    better, worse = (sum(p < ALPHA and sign * delta > 0 for delta, p, _ in found) for sign in (1, -1))
    times = [ratio for *_, ratio in found if ratio is not None]
    at = f", at {min(times):.2f} to {max(times):.2f} × the median latency" if times else ""
    return f"better in {better} of {len(found)}, worse in {worse}, not told from chance in {len(found) - better - worse}{at}"


def _collection(one: Collected, axes: list[str]) -> list[Block]:
    """All rows of a collection, highest mean first."""
    whole, found = one.whole, verdict(one.whole)
    order = sorted(whole.rows, key=lambda label: -whole.rows[label]["measures"][whole.primary])
    rows = []
    for label in order:
        row, below = whole.rows[label], found.below.get(label)
        vs, seen, new = row["vs"], row["latency_ms"], row["cold_latency_ms"]
        rows.append([
            *_values(row), _mean(whole, label),
            *([Cell(interval(below.delta, below.ci95, "+.4f", "+.3f"), below.delta), Cell(p_text(below.p), below.p)] if below else [Cell("highest" if label == found.highest else "-"), Cell("-")]),
            *([Cell(interval(vs["delta"], vs["ci95"], "+.4f", "+.3f"), vs["delta"]), Cell(p_text(vs["p_holm"]), vs["p_holm"])] if vs else [Cell("baseline", 0.0), Cell("-")]),
            number(seen and seen["p50"], ",.1f"), number(ratio(whole, label, whole.baseline), ".2f"), number(new and new["p50"], ",.1f"), number(row["peak_rss_mb"], ",.0f"),
            *([Cell(row["machine"])] if len(one.views) > 1 else []),
        ])  # fmt: skip
    columns = ["method", *axes, f"{whole.primary} [95% CI]", "Δ highest [95% CI]", "p, Holm", "Δ baseline [95% CI]", "p, Holm", "p50 ms"]
    columns += ["× latency", "new documents, ms", "peak MB", *(["timed with"] if len(one.views) > 1 else [])]
    blocks: list[Block] = [Table(columns, rows)]
    if found.below:
        blocks.append(Row(_plots(one, order)))
    stages: dict[str, list[str]] = {}
    for cell in one.cells:
        stages.setdefault("; ".join(head(cell.one.result)[1:]), []).append(cell.name)
    blocks.append(Text(head(one.cells[0].one.result)[:1], item=True))
    blocks += [Text([f"{line} (in {' and '.join(names)})" if len(stages) > 1 else line], item=True) for line, names in stages.items()]
    notes = dict.fromkeys(note for cell in one.cells for part in ("dataset", "candidates") for note in cell.one.result[part]["notes"])
    return [*blocks, *(Text([Quoted(note)], item=True) for note in notes)]


def _plots(one: Collected, order: Sequence[str]) -> list[Plot]:
    """Every row below the highest mean; query by query, those that no other dominates."""
    whole, found = one.whole, verdict(one.whole)
    below = {label: found.below[label] for label in order if label in found.below}
    said = "; ".join(f"{label} {interval(vs.delta, vs.ci95, '+.4f', '+.3f')}, Holm p {p_text(vs.p)}" for label, vs in below.items())
    deltas = {label: {"delta": vs.delta, "ci95": vs.ci95, "p_holm": vs.p} for label, vs in below.items()}
    forest = figures.forest(deltas, whole.primary, whole.name, found.highest, [*whole.rows])
    plots = [Plot(f"differences-{whole.stem}", forest, f"differences from {found.highest}: {said}")]
    kept = [label for view in one.views.values() for label in frontier(view) if label in deltas]
    if kept:
        changes = {label: (whole.measure(label) - whole.measure(found.highest)).to_numpy() for label in kept}
        strips = figures.strips(changes, whole.primary, whole.name, "the highest mean")
        plots.append(Plot(f"queries-{whole.stem}", strips, f"sorted differences by query from {found.highest} of what nothing dominates: {', '.join(kept)}"))
    return plots


def _cell(cell: Done, first: Done) -> list[Block]:
    """Its folder, what its environment has different from the first cell's, and its command."""
    own, others = (flat(x.one.result["environment"]) for x in (cell, first))
    differing = [f"{key} {own.get(key, 'absent')}, not {others.get(key, 'absent')}" for key in sorted({*own, *others}) if own.get(key) != others.get(key)]
    environment = "the first cell" if cell is first else "the first cell's environment" if not differing else f"in its environment {'; '.join(differing)}"
    return [Text([Strong(cell.name), f": {environment}."]), Code(content.command(cell.one.result["config"]))]
