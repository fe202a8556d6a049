"""The page of a grid of evaluations: the cells of a collection side by side, and what each axis of the grid changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from rerank_lab.eval.table import ALPHA, head, interval, p_text
from rerank_lab.measures import stats
from rerank_lab.report import content, figures
from rerank_lab.report.blocks import Block, Cell, Code, Details, Paragraph, Plot, Plots, Quoted, Section, Strong, Table
from rerank_lab.report.compare import environment
from rerank_lab.report.content import against, mean, number, p50
from rerank_lab.report.grid import CellRow, CollectionCells, FinishedCell, Grid, JoinedRows
from rerank_lab.report.verdict import frontier, ratio, sentence, verdict


def page(grid: Grid, made_by: str) -> Section:
    """The page of a grid; made_by is the command that made it."""
    wholes, cells = [one.whole for one in grid.collections], grid.cells
    blocks: list[Block] = [Paragraph(finding(one), item=len(wholes) > 1) for one in grid.collections]
    blocks += [Paragraph([line], item=True) for line in _remarks(grid)]
    blocks.append(across(grid))
    views = [view for one in grid.collections for view in one.views.values() if any(row.latency_ms for row in view.rows.values())]
    blocks.append(Plots([Plot(f"pareto-{view.stem}", figures.pareto(view), figures.described(view)) for view in views]))
    blocks += content.footing([cell.one for cell in cells], made_by)
    for axis in grid.axes:
        blocks.append(Section(f"What {axis} changes", 2, _axis(grid, axis)))
    for one in grid.collections:
        blocks.append(Section(one.whole.name, 2, _collection(one, [*grid.axes])))
    listed = Details(f"{len(cells)} folders and the commands that make them again", [block for cell in cells for block in _cell(cell, cells[0])])
    blocks.append(Section("Cells", 2, [listed]))
    over = f": a grid over {', '.join(grid.axes)}" if grid.axes else f": a grid of {len(cells)}"
    return Section(content.title(wholes) + over, 1, blocks)


def finding(one: CollectionCells) -> list[str]:
    """The finding about one collection, as parts of a paragraph. If several machines timed its rows, it names the cheapest row of each."""
    whole = one.whole
    if len(one.views) == 1:
        return sentence(whole, "rows")
    found, highest = verdict(whole), whole.rows[verdict(whole).highest]
    value = interval(highest.measures[whole.primary], highest.ci95[whole.primary])
    parts = [Strong(whole.name), ": the highest mean is ", Strong(found.highest), f"'s, {whole.primary} {value}, of {len(found.below) + 1} rows"]
    for machine, view in one.views.items():
        level = [label for label in view.rows if label == found.highest or (label in found.below and found.below[label].p_holm >= ALPHA)]
        if not level:
            parts.append(f"; with {machine} all are told from it")
            continue
        latencies = {label: view.rows[label].latency_ms for label in level}
        use = min(level, key=lambda label: latency.p50 if (latency := latencies[label]) else 0.0)
        below = found.below.get(use)
        gap = f", {interval(below.delta, below.ci95, '+.3f', '+.3f')} (Holm p {p_text(below.p_holm)})" if below else ""
        parts += [f"; with {machine} the cheapest that cannot be told from it is ", Strong(use), gap]
    return [*parts, "."]


def _remarks(grid: Grid) -> Iterator[str]:
    if grid.unfinished:
        yield unfinished(grid)
    if len({machine for one in grid.collections for machine in one.views}) > 1:
        yield "Cells were timed on different machines or settings of one: times are compared within each alone, in plots of their own, and there is no ratio across."
    if grid.axes:
        yield f"A row is a method ({', '.join(grid.axes)}). A collection's Δ and × are against the baseline of its first cell."
    if (rows := max(len(one.whole.rows) for one in grid.collections)) > figures.MOST_NAMED:
        yield f"All pairs of {rows} rows are {rows * (rows - 1) // 2} tests, so that it takes more to be told from the highest mean than from the baseline."
    if grid.repeated:
        yield "A row that several cells hold stands once, from the first of them."


def unfinished(grid: Grid) -> str:
    """A sentence about the cells that are left out."""
    return f"Not finished and left out, {len(grid.unfinished)} of {len(grid.cells) + len(grid.unfinished)} cells: {'; '.join(grid.unfinished)}."


def across(grid: Grid) -> Table:
    """A line for each row of a cell, columns for each collection: quality, and latency as a multiple of the baseline's."""
    wholes = [one.whole for one in grid.collections]
    rows = {label: cell_row for whole in wholes for label, cell_row in whole.cell_rows.items()}
    cells = [
        [
            *_values(cell_row),
            *(_mean(whole, label) for whole in wholes),
            *(number(ratio(whole, label, whole.baseline) if label in whole.rows else None, ".2f") for whole in wholes),
        ]
        for label, cell_row in rows.items()
    ]
    return Table(["method", *grid.axes, *(f"{whole.name}, {whole.primary}" for whole in wholes), *(f"{whole.name}, × latency" for whole in wholes)], cells)


def _values(cell_row: CellRow, *without: str) -> list[Cell]:
    return [Cell(cell_row.row.label), *(Cell(value) for axis, value in cell_row.values.items() if axis not in without)]


def _mean(whole: JoinedRows, label: str) -> Cell:
    row = whole.rows.get(label)
    return Cell("-") if row is None else mean(row, whole.primary)


def _axis(grid: Grid, axis: str) -> list[Block]:
    """What one option changes, in pairs of rows that have all other options equal."""
    pairs = [
        (one.whole, a, b, (one.whole.measure(b) - one.whole.measure(a)).to_numpy())
        for one in grid.collections
        for a, b in _pairs(one.whole, axis, [*grid.axes[axis].values()])
    ]
    p_values = list[float]()
    for one in grid.collections:
        if own := [change for whole, *_, change in pairs if whole is one.whole]:
            p_values += stats.randomized_family(own, len(pairs), one.whole.seed)
    two_stages = not all(_same_candidates(whole.cell_rows[a], whole.cell_rows[b]) for whole, a, b, _ in pairs)
    rows, counted = list[list[Cell]](), dict[str, list[tuple[float, float, float | None]]]()
    for (whole, a, b, change), p in zip(pairs, stats.holm(p_values)):
        before, after = whole.cell_rows[a], whole.cell_rows[b]
        delta, step, times = float(change.mean()), f"{before.values[axis]} → {after.values[axis]}", ratio(whole, b, a)
        counted.setdefault(step, []).append((delta, p, times))
        rows.append([
            Cell(whole.name), *_values(before, axis), Cell(step), Cell(interval(delta, stats.bootstrap_interval(change, whole.seed), "+.4f", "+.4f"), delta),
            Cell(p_text(p), p), Cell(f"{(change > 0).sum()}/{(change == 0).sum()}/{(change < 0).sum()}", float((change > 0).sum())), number(times, ".2f"),
            *([Cell("same" if _same_candidates(before, after) else "other")] if two_stages else []),
        ])  # fmt: skip
    columns = ["collection", "method", *(name for name in grid.axes if name != axis), "from → to", f"Δ {grid.collections[0].whole.primary} [95% CI]", "p, Holm"]
    columns += ["won/tied/lost", "× latency", *(["candidates"] if two_stages else [])]
    summary = [Paragraph([Strong(step), f": {_counted(found)}."], item=True) for step, found in counted.items()]
    stages = " Where candidates are other ones, the first stage changed too, and the difference is of both." if two_stages else ""
    text = f"All else equal, paired by query; p from a randomisation test, Holm-corrected over the {len(rows)} rows of the table.{stages}"
    return [*summary, Paragraph([text]), Table(columns, rows)]


def _same_candidates(a: CellRow, b: CellRow) -> bool:
    return a.cell.one.result.candidates.hash == b.cell.one.result.candidates.hash


def _pairs(whole: JoinedRows, axis: str, order: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of labels of rows that differ only in this axis, the earlier value first."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for label, cell_row in whole.cell_rows.items():
        alike.setdefault((cell_row.row.label, *(value for name, value in cell_row.values.items() if name != axis)), []).append(label)
    for labels in alike.values():
        yield from combinations(sorted(labels, key=lambda label: order.index(whole.cell_rows[label].values[axis])), 2)


def _counted(found: Sequence[tuple[float, float, float | None]]) -> str:
    better, worse = (sum(p < ALPHA and sign * delta > 0 for delta, p, _ in found) for sign in (1, -1))
    times = [ratio for *_, ratio in found if ratio is not None]
    at = f", at {min(times):.2f} to {max(times):.2f} × the median latency" if times else ""
    return f"better in {better} of {len(found)}, worse in {worse}, not told from chance in {len(found) - better - worse}{at}"


def _collection(one: CollectionCells, axes: list[str]) -> list[Block]:
    """Blocks about one collection: all rows, highest mean first, plots and notes."""
    whole, found = one.whole, verdict(one.whole)
    order = sorted(whole.rows, key=lambda label: -whole.rows[label].measures[whole.primary])
    rows = []
    for label in order:
        cell_row, row, below = whole.cell_rows[label], whole.rows[label], found.below.get(label)
        rows.append([
            *_values(cell_row), mean(row, whole.primary),
            *(against(below) if below else [Cell("highest" if label == found.highest else "-"), Cell("-")]), *against(row.vs),
            number(p50(row.latency_ms), ",.1f"), number(ratio(whole, label, whole.baseline), ".2f"), number(p50(row.cold_latency_ms), ",.1f"), number(row.peak_rss_mb, ",.0f"),
            *([Cell(cell_row.machine)] if len(one.views) > 1 else []),
        ])  # fmt: skip
    columns = ["method", *axes, f"{whole.primary} [95% CI]", "Δ highest [95% CI]", "p, Holm", "Δ baseline [95% CI]", "p, Holm", "p50 ms"]
    columns += ["× latency", "new documents, ms", "peak MB", *(["timed with"] if len(one.views) > 1 else [])]
    blocks: list[Block] = [Table(columns, rows)]
    if found.below:
        blocks.append(Plots(_plots(one, order)))
    stages: dict[str, list[str]] = {}
    for cell in one.cells:
        stages.setdefault("; ".join(head(cell.one.result)[1:]), []).append(cell.name)
    blocks.append(Paragraph(head(one.cells[0].one.result)[:1], item=True))
    blocks += [Paragraph([f"{line} (in {' and '.join(names)})" if len(stages) > 1 else line], item=True) for line, names in stages.items()]
    notes = dict.fromkeys(note for cell in one.cells for part in (cell.one.result.dataset, cell.one.result.candidates) for note in part.notes)
    return [*blocks, *(Paragraph([Quoted(note)], item=True) for note in notes)]


def _plots(one: CollectionCells, order: Sequence[str]) -> list[Plot]:
    """Two plots: every row below the highest mean; and, query by query, the rows that no other row dominates."""
    whole, found = one.whole, verdict(one.whole)
    below = {label: found.below[label] for label in order if label in found.below}
    summary = "; ".join(f"{label} {interval(vs.delta, vs.ci95, '+.4f', '+.3f')}, Holm p {p_text(vs.p_holm)}" for label, vs in below.items())
    forest = figures.forest(below, whole.primary, whole.name, found.highest, whole.rows)
    plots = [Plot(f"differences-{whole.stem}", forest, f"differences from {found.highest}: {summary}")]
    kept = [label for view in one.views.values() for label in frontier(view) if label in below]
    if kept:
        changes = {label: (whole.measure(label) - whole.measure(found.highest)).to_numpy() for label in kept}
        strips = figures.strips(changes, whole.primary, whole.name, "the highest mean", whole.rows)
        plots.append(Plot(f"queries-{whole.stem}", strips, f"sorted differences by query from {found.highest} of what nothing dominates: {', '.join(kept)}"))
    return plots


def _cell(cell: FinishedCell, first: FinishedCell) -> list[Block]:
    """A cell's folder, how its environment differs from the first cell's, and its command."""
    own, others = (environment(x.one) for x in (cell, first))
    differing = [f"{key} {own.get(key, 'absent')}, not {others.get(key, 'absent')}" for key in sorted({*own, *others}) if own.get(key) != others.get(key)]
    summary = "the first cell" if cell is first else "the first cell's environment" if not differing else f"in its environment {'; '.join(differing)}"
    return [Paragraph([Strong(cell.name), f": {summary}."]), Code(content.command(cell.one.result.config.options))]
