"""Every figure of the report, drawn by matplotlib with one style file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypedDict

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from rerank_lab.eval.results import Interval, Row
from rerank_lab.eval.table import interval, p_text
from rerank_lab.methods import labels as known_labels
from rerank_lab.report.load import ComparableRows, ResultsFolder
from rerank_lab.report.verdict import compared, frontier
from rerank_lab.timing import PHASES

STYLE = Path(__file__).with_name("style.mplstyle")
DOMINATED = "#9a9a9a"
INK = "#333333"
PHASE_LOOKS = [("#d9d9d9", ""), ("#56B4E9", "////"), ("#0072B2", ""), ("#333333", "")]
CORNERS = [(dx, dy, side) for dy in (5, -12, 18, -25, 31, -38, 44, -51) for dx, side in ((6, "left"), (-6, "right"), (26, "left"), (-26, "right"))]
MOST_NAMED = 10  # a Pareto plot of more rows has numbers and a legend instead of names
P = ParamSpec("P")


class RowStyle(TypedDict):
    """How a row is drawn, in matplotlib's terms."""

    color: str
    marker: str


class LegendStyle(RowStyle, total=False):
    """How a row is drawn in a legend."""

    markerfacecolor: str


class TestedDifference(Protocol):
    """A difference of means, its 95% interval (None for a single query), and its corrected p."""

    @property
    def delta(self) -> float: ...
    @property
    def ci95(self) -> Interval | None: ...
    @property
    def p_holm(self) -> float: ...


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes a function draw with the style file, independent of the user's own settings."""

    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        with style.context(["default", STYLE]):
            return draw(*args, **options)

    return drawn


def saved(figure: Figure, kind: str) -> bytes:
    """A figure as "svg" or "png". The same figure always gives the same bytes."""
    buffer = io.BytesIO()
    with style.context(["default", STYLE]):
        figure.savefig(buffer, format=kind, metadata={"Date": None, "Creator": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def looks(rows: Mapping[str, Row]) -> dict[str, RowStyle]:
    """Label → colour and marker, for the known methods and for the rows.

    Known methods take the first styles of the style file's cycle, in the registry's order. Other rows take the next ones.
    """
    known, styles = list(known_labels()), matplotlib.rc_params_from_file(STYLE, use_default_template=False)["axes.prop_cycle"]
    own = dict(zip(dict.fromkeys([*known, *(row.label for row in rows.values())]), cycle(styles)))
    names = [*zip(known, known), *((label, row.label) for label, row in rows.items())]
    return {label: RowStyle(color=own[name]["color"], marker=own[name]["marker"]) for label, name in names}


@styled
def pareto(one: ComparableRows) -> Figure:
    """Quality with its 95% interval against median latency. Dominated rows are grey. If there are many rows, the others get numbers and a legend."""
    best, weighed, look = frontier(one), {*compared(one)}, looks(one.rows)
    timed = {label: row for label, row in one.rows.items() if row.latency_ms}
    at = {label: (latency.p50, row.measures[one.primary]) for label, row in one.rows.items() if (latency := row.latency_ms)}
    names = {label: short(label, row.label) for label, row in timed.items()}
    crowd = len(timed) > MOST_NAMED or any("\n" in name for name in names.values())
    figure = Figure(figsize=(4.8, 3.4 + 0.18 * len(best))) if crowd else Figure()
    if crowd:
        names = {label: str(n) for n, label in enumerate(best, 1)}
        marks = {f"{names[label]}  {label}": look[label] for label in best}
        shown = {one.rows[label].label for label in best}
        for name, label in {row.label: label for label, row in timed.items() if row.label not in shown}.items():
            mark = look[label]["marker"]
            marks[name] = LegendStyle(**look[label], markerfacecolor="white") if timed[label].system.remote else LegendStyle(color=DOMINATED, marker=mark)
        figure.legend([Line2D([], [], ls="", **mark) for mark in marks.values()], [*marks], loc="outside lower left", handletextpad=0.2)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.grid(True)
    x, y = zip(*(at[label] for label in best))
    steps = [*x, max(p[0] for p in at.values()) * 2], [*y, y[-1]]
    axes.step(*steps, where="post", color=INK, lw=1, ls=(0, (4, 2)), marker="", zorder=1)
    for label, row in timed.items():
        colour = look[label]["color"] if label in best or label not in weighed else DOMINATED
        face = "white" if row.system.remote else colour
        ci, value = row.ci95[one.primary], row.measures[one.primary]
        error = None if ci is None or label not in names else np.array([[max(0, value - ci[0])], [max(0, ci[1] - value)]])
        axes.errorbar(
            at[label][0],
            value,
            error,
            color=colour,
            marker=look[label]["marker"],
            markersize=8,
            markerfacecolor=face,
            elinewidth=1.2,
            capsize=3,
            zorder=3,
        )
    _log_ticks(axes, [p[0] for p in at.values()])
    remote = "\n(servers, hollow: over HTTP, what they had seen is not known)" if any(row.system.remote for row in timed.values()) else ""
    axes.set_xlabel(f"median latency of a query, ms, documents seen before{remote}")
    axes.set_ylabel(f"{one.primary}, 95% interval")
    axes.set_title(one.name)
    bars = {label: row.ci95[one.primary] or [at[label][1]] * 2 for label, row in timed.items() if label in names}
    level = [*zip(steps[0], steps[0][1:], steps[1])]
    _name_points(figure, axes, at, bars, level, names, {label: INK if label in best else "#6b6b6b" for label in names})
    return figure


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    axes.set_xlim(low / 1.6, high * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_points(
    figure: Figure, axes: Axes, at: Mapping[str, tuple[float, float]], bars: Mapping[str, Sequence[float]],
    level: Sequence[tuple[float, float, float]], names: Mapping[str, str], colours: Mapping[str, str],
) -> None:  # fmt: skip
    """Puts each name at the corner of its point where it hides least of the other names, markers, intervals and lines.

    Args:
        figure, axes: the plot.
        at: label → its point.
        bars: label → lower and upper end of its interval.
        level: horizontal lines: from x, to x, at y.
        names: label → the name to write.
        colours: label → colour of the name.
    """
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    place = axes.transData.transform
    marks = [Bbox([place(point), place(point)]).padded(8) for point in at.values()]
    lines = [Bbox([place((at[label][0], bar[0])), place((at[label][0], bar[1]))]) for label, bar in bars.items()]
    lines += [Bbox([place((a, y)), place((b, y))]) for a, b, y in level]
    frame, taken = axes.get_window_extent(renderer), list[Any]()
    for label, point in sorted(((label, at[label]) for label in names), key=lambda item: item[1]):
        annotate = partial(axes.annotate, names[label], point, textcoords="offset points", fontsize=8.5, color=colours[label], zorder=5)
        tried: list[tuple[float, Any, tuple[int, int, str]]] = []
        for far, (dx, dy, side) in enumerate(CORNERS):
            note = annotate((dx, dy), ha=side)
            box = note.get_window_extent(renderer)
            note.remove()
            hidden = 0.1 * far + sum(box.overlaps(line) for line in lines) + 3 * sum(box.overlaps(mark) for mark in marks)
            hidden += 9 * sum(box.overlaps(other) for other in taken) + 9 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0)
            tried.append((hidden, box, (dx, dy, side)))
        _, box, (dx, dy, side) = min(tried, key=lambda one: one[0])
        taken.append(box.padded(1))
        leader = {"arrowstyle": "-", "lw": 0.7, "color": colours[label], "shrinkA": 0, "shrinkB": 4} if abs(dx) > 6 or not -12 <= dy <= 5 else None
        annotate((dx, dy), ha=side, arrowprops=leader, bbox={"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 0.6})


@styled
def forest(deltas: Mapping[str, TestedDifference], measure: str, title: str, against: str, rows: Mapping[str, Row]) -> Figure:
    """Differences with their 95% intervals, and the corrected p beside each.

    Args:
        deltas: label → its difference.
        measure: what is compared.
        title: of the figure, the collection.
        against: what each row is compared with.
        rows: all rows of the report by label; they give each row the same style in every figure.
    """
    figure = Figure(figsize=(4.8, 1.1 + 0.34 * len(deltas)))
    axes = figure.subplots()
    look, names = looks(rows), list(deltas)[::-1]
    axes.axvline(0, color=INK, lw=1)
    axes.grid(True, axis="x")
    for place, label in enumerate(names):
        vs = deltas[label]
        ci = vs.ci95 or [vs.delta] * 2
        axes.plot(ci, [place] * 2, color=look[label]["color"], lw=2, marker="|", markersize=7)
        axes.plot(vs.delta, place, color=look[label]["color"], marker=look[label]["marker"], markersize=8)
    axes.set_yticks(range(len(names)), [short(label, rows[label].label) for label in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(names)), [p_text(deltas[name].p_holm) for name in names])
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    axes.annotate("Holm p", (1, 1), (4, 2), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=INK)
    axes.set_xlabel(f"difference in {measure} from {against}, 95% interval" if len(against) < 30 else f"difference in {measure}, 95% interval, from\n{against}")
    axes.set_title(title)
    return figure


@styled
def strips(changes: Mapping[str, np.ndarray], measure: str, title: str, against: str, rows: Mapping[str, Row]) -> Figure:
    """The differences of all queries, sorted, in one strip for each row, with wins, ties and losses.

    Args:
        changes: label → one difference for each query.
        measure, title, against, rows: as for `forest`.
    """
    figure = Figure(figsize=(4.8, 0.9 + 0.75 * len(changes)))
    panels = np.atleast_1d(figure.subplots(len(changes), sharex=True, sharey=True))
    for axes, (label, unsorted) in zip(panels, changes.items()):
        change = np.sort(unsorted)[::-1]
        edges = np.arange(len(change) + 1)
        axes.stairs(np.clip(change, 0, None), edges, fill=True, color="#0072B2", lw=0)
        axes.stairs(np.clip(change, None, 0), edges, fill=True, color="#D55E00", lw=0, hatch="////", edgecolor="#7a2f00")
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_title(short(label, rows[label].label), fontweight="normal", fontsize=8.5, pad=2)
        axes.set_title(
            f"{(change > 0).sum()} won, {(change == 0).sum()} tied, {(change < 0).sum()} lost", loc="right", fontweight="normal", fontsize=8.5, pad=2
        )
        axes.set_xlim(0, len(change))
    panels[-1].set_xlabel(f"queries of {title}, sorted by difference")
    figure.supylabel(textwrap.fill(f"{measure} less {against}'s", 12 + 12 * len(changes)), fontsize=9)
    return figure


@styled
def phases(one: ResultsFolder) -> Figure:
    """Where a query's time goes: the phases' medians as bars, with documents seen before and with every document new."""
    rows = one.result.rows[::-1]  # so that the first is on top
    seen = {row.label: row.phases_ms for row in rows if row.phases_ms}
    new = {row.label: row.cold_phases_ms for row in rows if row.cold_phases_ms}
    shown = [(title, medians) for title, medians in (("documents seen before", seen), ("every document new", new)) if medians]
    count = sum(len(medians) for _, medians in shown)
    figure = Figure(figsize=(4.8, 0.9 + 0.55 * len(shown) + 0.26 * count))
    panels = np.atleast_1d(figure.subplots(len(shown), height_ratios=[len(medians) + 0.8 for _, medians in shown]))
    for axes, (title, medians) in zip(panels, shown):
        names, start = list(medians), np.zeros(len(medians))
        for phase, (colour, hatch) in zip(PHASES, PHASE_LOOKS):
            width = np.array([ms[phase] for ms in medians.values()])
            axes.barh(range(len(names)), width, left=start, height=0.66, color=colour, hatch=hatch, edgecolor="white" if hatch else colour, lw=0, label=phase)
            start += width
        for place, total in enumerate(start):
            axes.annotate(f"{total:,.1f}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.set_xlim(0, start.max() * 1.16)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_title(f"{one.name}, {title}")
        axes.grid(True, axis="x")
    panels[-1].set_xlabel("ms a query, sum of the phases' medians")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), handlelength=1.2, columnspacing=1.2)
    return figure


@styled
def swept(one: ResultsFolder, setting: str) -> Figure:
    """Quality over the values of one setting. A panel above shows what the candidates allow: recall, and the measure of their best order."""
    points = [point for point in one.result.sweeps if point.setting == setting]
    values, labels = list(dict.fromkeys(point.value for point in points)), list(dict.fromkeys(point.label for point in points))
    numbers = [value for value in values if not isinstance(value, str)]
    places = dict(zip(values, numbers if len(numbers) == len(values) else range(len(values))))  # beside a word, values stand at equal distances
    look = looks(one.rows)
    figure = Figure(figsize=(4.8, 4.4))
    above, axes = figure.subplots(2, sharex=True, height_ratios=[1, 2.2])
    at = [[point for point in points if point.value == value] for value in values]
    recall, ceiling = [max(p.recall for p in own) for own in at], [max(p.ceiling for p in own) for own in at]
    above.plot(list(places.values()), recall, color=INK, ls="-", lw=1.2, marker="", label="recall of what is ranked, at most")
    above.plot(list(places.values()), ceiling, color=INK, ls=(0, (4, 2)), lw=1.2, marker="", label=f"its best order's {one.result.ceiling_measure}")
    low, high = above.get_ylim()
    above.set_ylim(min(low, high - 0.05), high)  # values that hardly change look level
    above.legend(loc="lower right")
    for label in labels:
        own = sorted((places[p.value], p.measures[one.primary]) for p in points if p.label == label)
        axes.plot(*zip(*own), **look[label], label=label)
    for label, row in one.rows.items():
        if label not in labels and not row.system.remote:
            level, top_k = row.measures[one.primary], one.result.candidates.top_k
            axes.axhline(level, color=look[label]["color"], ls=(0, (1, 1.5)), lw=1.3, label=f"{label}, top {top_k}")
    if len(numbers) == len(values) and min(numbers) > 0 and max(numbers) / min(numbers) >= 4:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    axes.set_xticks(list(places.values()), [value if isinstance(value, str) else f"{value:,g}" for value in values])
    axes.set_xlabel(f"{setting}{UNITS.get(setting, '')}")
    axes.set_ylabel(one.primary)
    above.set_ylabel("ceiling")
    for panel in (above, axes):
        panel.grid(True)
    above.set_title(one.name)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def short(label: str, name: str | None = None) -> str:
    """Shortens a label so that it fits beside an axis. Long labels lose their middle, since their ends tell them apart.

    Args:
        label: of the row on the page.
        name: the row's own label. If the whole is too long, what follows the name goes onto a second line. None: nothing follows.
    """
    if len(label) <= 26:
        return label
    name = label if name is None else name
    values = label.removeprefix(name).strip()
    return "\n".join(part if len(part) <= room else f"{part[:11]}…{part[-14:]}" for part, room in ((name, 26), (values, 30)) if part)


UNITS = {"stage1_top_k": ", documents that stage 1 keeps", "max_tokens_per_doc": ", tokens kept of a document", "top_k": ", candidates a query"}


def described(one: ComparableRows) -> str:
    """The Pareto plot as text, for readers who cannot see it."""
    points = [
        f"{label} {interval(row.measures[one.primary], row.ci95[one.primary])} at {row.latency_ms.p50:,.1f} ms"
        for label, row in one.rows.items()
        if row.latency_ms
    ]
    return f"{one.primary} against median latency on {one.name}: {'; '.join(points)}; not dominated: {', '.join(frontier(one))}"
