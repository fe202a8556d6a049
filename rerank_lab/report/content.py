"""The sections of a report in order: first the finding, then what a reader needs to check it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from rerank_lab.engine import spread_in
from rerank_lab.eval.kernel_check import CHECKED_DTYPES
from rerank_lab.eval.results import Latency, Row
from rerank_lab.eval.table import changes, head, interval, p_text
from rerank_lab.files import Json
from rerank_lab.methods import shown
from rerank_lab.report import figures
from rerank_lab.report.blocks import Block, Cell, Code, Paragraph, Plot, Plots, Quoted, Section, Table
from rerank_lab.report.figures import TestedDifference
from rerank_lab.report.load import ComparableRows, ResultsFolder, anchor
from rerank_lab.report.verdict import ratio, sentence, verdict
from rerank_lab.timing import PHASES

SEEN = "documents seen before"
DOUBT = (
    "How to read it: an interval is the 95% bootstrap interval of a mean over queries; Δ is paired by query, its p from a randomisation test, "
    "Holm-corrected over the methods (intervals are not corrected). The method in bold is the cheapest of those that cannot be told from the highest "
    "mean, by tests corrected over all pairs; that is no proof of being equal, and from random swaps a p near .05 is known to about .01. "
    "Latency is the median of one query at a time, its documents' vectors cached; compare times within one table alone. Grey marks in the plot are "
    "dominated: another method is at least as good and no slower."
)


def overview(every: Sequence[ResultsFolder], made_by: str) -> list[Block]:
    """The first screen: a sentence for each collection, the table, the Pareto plots, and how the report was made."""
    blocks: list[Block] = [Paragraph(sentence(one), item=len(every) > 1) for one in every]
    blocks.append(main_table(every[0]) if len(every) == 1 else _across(every))
    blocks.append(Plots([Plot(f"pareto-{one.stem}", figures.pareto(one), figures.described(one)) for one in every if _timed(one)]))
    return [*blocks, *footing(every, made_by)]


def footing(every: Sequence[ResultsFolder], made_by: str) -> list[Block]:
    """How to read the first screen, and what made it."""
    servers = any(row.system.remote for one in every for row in one.result.rows)
    doubt = DOUBT + (" Hollow marks are servers, timed over HTTP; they are not weighed against methods that ran here." if servers else "")
    environments = (one.result.environment for one in every)
    where = dict.fromkeys(f"commit {env.commit or 'unknown'} on {env.cpu}, {env.cpus} CPUs, device {env.device}" for env in environments)
    return [Paragraph([doubt]), Paragraph([f"Made by {made_by}; evaluated at {' and at '.join(where)}."])]


def main_table(one: ResultsFolder) -> Table:
    """One line for each row: quality, difference from the baseline, cost."""
    primary = one.primary
    columns = ["method", f"{primary} [95% CI]", "Δ [95% CI]", "Holm p", "p50 ms", "× latency", "new documents, ms", "docs/s", "peak MB", "MFLOP"]
    rows = []
    for label, row in one.rows.items():
        rows.append([
            Cell(label), mean(row, primary), *against(row.vs),
            number(p50(row.latency_ms), ",.1f"), number(ratio(one, label, one.baseline), ".1f"), number(p50(row.cold_latency_ms), ",.1f"), number(row.docs_per_s, ",.0f"),
            number(row.peak_rss_mb, ",.0f"), number(row.flops_per_query and row.flops_per_query / 1e6, ",.0f"),
        ])  # fmt: skip
    return Table(columns, rows)


def p50(latency: Latency | None) -> float | None:
    """Median milliseconds; None: not measured."""
    return None if latency is None else latency.p50


def mean(row: Row, measure: str) -> Cell:
    """A cell with a row's mean and its interval."""
    return Cell(interval(row.measures[measure], row.ci95[measure]), row.measures[measure])


def against(vs: TestedDifference | None) -> list[Cell]:
    """Two cells: a row's difference from another, and its p; vs=None: the row is the baseline."""
    if vs is None:
        return [Cell("baseline", 0.0), Cell("-")]
    return [Cell(interval(vs.delta, vs.ci95, "+.4f", "+.3f"), vs.delta), Cell(p_text(vs.p_holm), vs.p_holm)]


def number(value: float | None, form: str) -> Cell:
    """A cell with a number, or with a dash for None."""
    return Cell("-") if value is None else Cell(f"{value:{form}}", float(value))


def _across(every: Sequence[ResultsFolder]) -> Table:
    """A line for each method, columns for each collection: quality, and latency as a multiple of the baseline's."""
    labels = list(dict.fromkeys(label for one in every for label in one.rows))
    columns = ["method", *(f"{one.name}, {one.primary}" for one in every), *(f"{one.name}, × latency" for one in every)]
    rows = []
    for label in labels:
        cells: list[Cell] = [Cell(label)]
        for one in every:
            row = one.rows.get(label)
            cells.append(Cell("-") if row is None else mean(row, one.primary))
        for one in every:
            cells.append(number(ratio(one, label, one.baseline) if label in one.rows else None, ".1f"))
        rows.append(cells)
    return Table(columns, rows)


def sections(one: ResultsFolder, level: int, errors: Sequence[Block], limits: Block | None) -> Iterator[Section]:
    """All sections below the first screen.

    Args:
        one: the evaluation.
        level: of their headings.
        errors: blocks about queries that gained and lost.
        limits: a block about the machine's limits, for the section on cost.
    """
    if level > 2:
        yield Section("The table", level, [main_table(one)])
    yield Section("Quality", level, [_measures(one), *(Paragraph([line], item=True) for line in head(one.result))])
    if any(row.vs for row in one.result.rows):
        yield Section("Differences", level, _differences(one))
    yield Section("Cost", level, [*_cost(one), *([limits] if limits else [])])
    yield Section("Depth and length", level, _swept(one))
    if any(row.vs_definition for row in one.result.rows):
        yield Section("Kernels and their definition", level, _kernels(one))
    yield Section("Queries that gained and lost", level, list(errors))
    yield Section("Trust", level, _trust(one))
    yield Section("Made by", level, _made(one))


def _measures(one: ResultsFolder) -> Table:
    names = one.result.config.measures
    rows = [[Cell(label), *(mean(row, name) for name in names)] for label, row in one.rows.items()]
    return Table(["method", *(f"{n} [95% CI]" for n in names)], rows)


def _differences(one: ResultsFolder) -> list[Block]:
    tested = {label: row.vs for label, row in one.rows.items() if row.vs}
    summary = "; ".join(f"{label} {interval(vs.delta, vs.ci95, '+.4f', '+.3f')}, Holm p {p_text(vs.p_holm)}" for label, vs in tested.items())
    counted = "; ".join(f"{label} {vs.wins} won, {vs.ties} tied, {vs.losses} lost" for label, vs in tested.items())
    own = {label: (one.measure(label) - one.measure(one.baseline)).to_numpy() for label in tested}
    plots = [
        Plot(f"differences-{one.stem}", figures.forest(tested, one.primary, one.name, one.baseline, one.rows), f"differences from {one.baseline}: {summary}"),
        Plot(
            f"queries-{one.stem}",
            figures.strips(own, one.primary, one.name, one.baseline, one.rows),
            f"sorted differences by query from {one.baseline}: {counted}",
        ),
    ]
    rows = [
        [
            Cell(label), Cell(interval(vs.delta, vs.ci95, "+.4f", "+.4f"), vs.delta), number(vs.p_t, ".3g"), number(vs.p_randomization, ".3g"),
            Cell(p_text(vs.p_holm), vs.p_holm), *(number(count, ",d") for count in (vs.wins, vs.ties, vs.losses)),
        ]
        for label, vs in tested.items()
    ]  # fmt: skip
    table = Table(["method", f"Δ {one.primary} [95% CI]", "p, t-test", "p, randomisation", "p, Holm", "won", "tied", "lost"], rows, f"Against {one.baseline}")
    found = verdict(one)
    highest = Table(
        ["method", f"below {found.highest} [95% CI]", "Holm p"],
        [[Cell(label), Cell(interval(vs.delta, vs.ci95, "+.4f", "+.4f"), vs.delta), Cell(p_text(vs.p_holm), vs.p_holm)] for label, vs in found.below.items()],
        f"Against {found.highest}, the highest mean (p corrected over all pairs of methods)",
    )
    return [Plots(plots), table, highest] if found.below else [Plots(plots), table]


def _cost(one: ResultsFolder) -> list[Block]:
    blocks = list[Block]()
    if any(row.phases_ms for row in one.result.rows):
        alt = "; ".join(f"{row.label}: " + ", ".join(f"{p} {row.phases_ms[p]:.1f} ms" for p in PHASES) for row in one.result.rows if row.phases_ms)
        blocks.append(Plots([Plot(f"cost-{one.stem}", figures.phases(one), f"time by phase on {one.name}, {SEEN}. {alt}")]))
    columns = ["method", "documents", "queries timed", "p50 ms", "p95 ms", *(f"{p} ms" for p in PHASES), "docs/s", "peak MB", "MFLOP"]
    blocks.append(Table(columns, [cells for row in one.result.rows for cells in _cost_rows(row)]))
    text = f"Seen: the documents' vectors are cached ({one.result.environment.vector_cache}) and the query is new. New: every document is encoded too. Phases are medians. "
    text += "FLOPs are matrix products by formula, a query of these candidates. Peak memory is the process's, with what it maps of the cache."
    if any(row.system.remote for row in one.result.rows):
        text += " A server is timed over HTTP, waiting after 429 and 503 included; what it had seen before is not known."
    return [*blocks, Paragraph([text])]


def _cost_rows(row: Row) -> Iterator[list[Cell]]:
    """A row's costs with documents seen before, and with every document new, as far as they were measured."""
    seen = (row.timed_queries, row.latency_ms, row.phases_ms, row.docs_per_s, row.peak_rss_mb, row.flops_per_query)
    new = (row.cold_sample.queries, row.cold_latency_ms, row.cold_phases_ms, row.cold_docs_per_s, row.cold_peak_rss_mb, row.cold_flops_per_query)
    for state, (queries, latency, phases, rate, memory, flops) in (("seen", seen), ("new", new)):
        if latency:
            times = [latency.p50, latency.p95, *(phases[p] if phases else None for p in PHASES)]
            sizes = [rate, memory, flops and flops / 1e6]
            shown = Cell("-" if row.system.remote else state)
            yield [Cell(row.label), shown, number(queries, ",d"), *(number(ms, ",.1f") for ms in times), *(number(size, ",.0f") for size in sizes)]


def _swept(one: ResultsFolder) -> list[Block]:
    points, ceiling = one.result.sweeps, one.result.ceiling_measure
    settings = list(dict.fromkeys(point.setting for point in points))
    if not settings:
        return [
            Paragraph(["Not measured. The evaluation's --sweep does: "]),
            Code("--sweep stage1_top_k=10,20,50,100,200 --sweep max_tokens_per_doc=64,128,256"),
        ]
    blocks: list[Block] = [
        Plots(
            [Plot(f"{anchor(setting)}-{one.stem}", figures.swept(one, setting), f"{one.primary} by {setting}, as in the table below") for setting in settings]
        )
    ]
    for setting in settings:
        own = [point for point in points if point.setting == setting]
        labels = list(dict.fromkeys(point.label for point in own))
        rows = []
        for value in dict.fromkeys(point.value for point in own):
            at = {point.label: point for point in own if point.value == value}
            cells = [number(at[label].measures[one.primary] if label in at else None, ".4f") for label in labels]
            limits = [number(max(point.recall for point in at.values()), ".4f"), number(max(point.ceiling for point in at.values()), ".4f")]
            cut = number(100 * max(point.truncated_share for point in at.values()), ".1f")
            rows.append([Cell(value) if isinstance(value, str) else Cell(f"{value:,g}", value), *cells, *limits, cut])
        columns = [setting, *labels, "recall of what is ranked, at most", f"oracle's {ceiling}, at most", "documents cut, %, at most"]
        blocks.append(Table(columns, rows, f"{one.primary} by {setting}"))
    return blocks


def _kernels(one: ResultsFolder) -> list[Block]:
    found = [(row.label, name, row.vs_definition[name]) for row in one.result.rows if row.vs_definition for name in CHECKED_DTYPES if name in row.vs_definition]
    rows = []
    for label, name, change in found:
        agreed = change.agreement
        values = (None, None, None) if agreed is None else (agreed.max_score_diff, agreed.kendall_tau, agreed.overlap_at_10)
        delta = Cell(interval(change.delta, change.ci95, "+.4f", "+.4f"), change.delta)
        rows.append([Cell(label), Cell(name), delta, *(number(value, form) for value, form in zip(values, (".1e", ".4f", ".4f")))])
    text = f"The kernels that ran ({one.result.environment.kernels}) read the documents' vectors in each type of number; the definition, plain torch in fp32, "
    text += "reads the same vectors. Scores are compared as they are shown. Rows that run a cross-encoder are left out."
    measures = dict.fromkeys(change.measure for *_, change in found)
    return [Table(["method", "type", f"Δ {', '.join(measures)} [95% CI]", "largest score difference", "Kendall's τ", "overlap at 10"], rows), Paragraph([text])]


def _trust(one: ResultsFolder) -> list[Block]:
    rows = [
        [
            Cell(label), Cell(", ".join(_setting(row, name) for name in row.settings) or "none"),
            *(number(share, ".1%") for share in (row.coverage, row.unjudged_share, row.truncated_share, row.tie_rate)), number(row.token_limit, "d"),
        ]
        for label, row in one.rows.items()
    ]  # fmt: skip
    columns = ["method", "settings", "queries covered", "unjudged in the top 10", "documents truncated", "tied neighbours", "token limit"]
    notes = [*one.result.dataset.notes, *one.result.candidates.notes]
    return [Table(columns, rows), *(Paragraph([Quoted(note)], item=True) for note in [*notes, *changes(one.result)] or ["No notes on the collection."])]


def _setting(row: Row, name: str) -> str:
    """A setting, with the number that was in use where it was set to a word."""
    return f"{name}={shown(row.settings[name])}" + (f" ({row.in_use[name]:.4g})" if name in row.in_use else "")


def _made(one: ResultsFolder) -> list[Block]:
    env, data, first, models = one.result.environment, one.result.dataset, one.result.candidates, one.result.models
    versions = ", ".join(f"{name} {version}" for name, version in env.packages.items())
    machine = f"{env.cpu}, {env.cpus} CPUs, {env.threads} threads, device {env.device}, kernels {env.kernels}"
    if cluster := env.executor:
        machine += f", Ray {cluster.version} with {cluster.workers} workers"
    made = f"at commit {env.commit or 'unknown'} on {machine}, Python {env.python}, {versions}. "
    readings = [f"# {models[role]} is read with {said}" for role in ("model", "model_cross") if (said := models.get(f"{role}_reading"))]
    spread = spread_in(models)
    readings += [] if spread is None else [f"# token similarities of {models['model']}: {spread}"]
    return [Code("\n".join([command(one.result.config.options), *readings])), Paragraph([f"{made}Collection {data.hash[:16]}, candidates {first.hash[:16]}."])]


def command(options: Mapping[str, Json]) -> str:
    """The command that makes these results again."""
    words = ["python -m rerank_lab.eval"]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, Mapping):  # --sweep: setting → values
            words += [f"{flag} {name}={','.join(map(str, values))}" for name, values in value.items()]
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag} {shlex.quote(','.join(value) if isinstance(value, list) else str(value))}")
    return " ".join(words)


def title(every: Sequence[ComparableRows]) -> str:
    """The report's heading."""
    names = [one.name for one in every]
    return "Reranking on " + (names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}")


def _timed(one: ResultsFolder) -> bool:
    return any(row.latency_ms for row in one.result.rows)
