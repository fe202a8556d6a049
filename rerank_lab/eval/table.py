"""Results as text for a terminal: the table, and a sentence for each finding."""

from __future__ import annotations

import re
import textwrap

from rerank_lab.eval.kernel_check import CHECKED_DTYPES
from rerank_lab.eval.results import Latency, Results

ALPHA = 0.05


def findings(results: Results) -> list[str]:
    """One sentence for each row: whether it differs from the baseline (Holm p below .05), by how much, and at what latency. Then `changes`."""
    base = next(row for row in results.rows if row.label == results.config.baseline)
    sentences = []
    for row in results.rows:
        if (vs := row.vs) is None:
            continue
        verb = "cannot be told from" if vs.p_holm >= ALPHA else "beats" if vs.delta > 0 else "is worse than"
        times = ""
        if row.latency_ms and base.latency_ms:
            what = "over HTTP" if row.system.remote or base.system.remote else "documents seen before"
            times = f", at {row.latency_ms.p50 / base.latency_ms.p50:.1f} x its median latency ({what})"
        gain = interval(vs.delta, vs.ci95, "+.3f", "+.3f")
        sentences.append(f"{row.label} {verb} {vs.baseline}: {gain} {vs.measure}, Holm p {p_text(vs.p_holm)}{times}.")
    return [*sentences, *changes(results)]


def changes(results: Results) -> list[str]:
    """One sentence for each row that a runtime or precision changes, and one for each endpoint: how far it agrees with the same method here."""
    sentences = []
    for row in results.rows:
        if lost := row.vs_fp32:
            most = lost.agreement and lost.agreement.max_score_diff
            delta, scores = interval(lost.delta, lost.ci95, "+.4f", "+.4f"), "" if most is None else f", largest score difference {most:.2g}"
            sentences.append(f"{row.label} under {results.models['arithmetic']}: {delta} {lost.measure} against torch, fp32 on the same candidates{scores}.")
    for row in results.rows:
        if agreed := row.agreement:
            values = ((agreed.kendall_tau, ".4f"), (agreed.overlap_at_10, ".4f"), (agreed.max_score_diff, ".2g"))
            tau, overlap, gap = ("undefined" if value is None else f"{value:{form}}" for value, form in values)
            queries = f"{agreed.queries} {'query' if agreed.queries == 1 else 'queries'}"
            sentences.append(
                f"{row.label} beside {agreed.other} here, {queries}: Kendall's tau {tau}, overlap at 10 {overlap}, largest score difference {gap}."
            )
    return sentences


def table(results: Results) -> str:
    """The results as text, 80 columns wide."""
    primary, *others = results.config.measures
    quality = [["method", f"{primary} [95% CI]", "delta [95% CI]", "Holm p", "p50 ms", "new docs"]]
    more = [["method", *others, "docs/s", "MB", "MFLOP"]]
    kernels = [["method", "kernels and definition", *CHECKED_DTYPES]]
    for row in results.rows:
        delta = interval(row.vs.delta, row.vs.ci95, "+.3f", "+.3f") if row.vs else "baseline"
        cost = [_ms(row.latency_ms), _ms(row.cold_latency_ms)]
        quality.append([row.label, interval(row.measures[primary], row.ci95[primary]), delta, p_text(row.vs.p_holm) if row.vs else "", *cost])
        values = [f"{row.measures[name]:.4f}" for name in others]
        more.append([row.label, *values, _whole(row.docs_per_s), _whole(row.peak_rss_mb), _whole(row.flops_per_query, 1e6)])
        if row.vs_definition:
            shown = [row.vs_definition.get(name) for name in CHECKED_DTYPES]
            gaps = [change.agreement.max_score_diff if change and change.agreement else None for change in shown]
            kernels.append(
                [row.label, next(iter(row.vs_definition.values())).measure, *("-" if change is None else f"{change.delta:+.4f}" for change in shown)]
            )
            kernels.append(["", "largest difference", *("-" if gap is None else f"{gap:.0e}" for gap in gaps)])
    said = [line for sentence in findings(results) for line in textwrap.wrap(sentence, 80)]
    return "\n".join(
        [*head(results), "", *_columns(quality), "", *_columns(more), "", *(([*_columns(kernels), ""]) if kernels[1:] else []), *said, *([""] if said else [])]
    )


def head(results: Results) -> list[str]:
    """Three lines: the collection, the first stage, and the ceiling that its candidates set."""
    data, first, primary = results.dataset, results.candidates, results.primary
    return [
        f"{data.name} ({data.split}): {results.rows[0].queries} judged queries, {data.documents:,} documents",
        f"first stage {first.source}, top {first.top_k}: {primary} {first.measures[primary]:.4f}, recall@{first.top_k} {first.recall:.4f}",
        f"best order of these candidates (oracle): {results.ceiling_measure} {first.ceiling:.4f}",
    ]


def interval(value: float, ci: list[float] | None, form: str = ".4f", ends: str = ".3f") -> str:
    """A value with its 95% interval, as text."""
    if ci is None:
        return f"{value:{form}} [one query]"
    low, high = (re.sub(r"^([+-]?)0\.", r"\1.", f"{end:{ends}}") for end in ci)
    return f"{value:{form}} [{low}, {high}]"


def p_text(p: float | None) -> str:
    """A p-value as text, never 0."""
    return "undefined" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _whole(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def _ms(latency: Latency | None) -> str:
    return f"{latency.p50:,.1f}" if latency else "-"


def _columns(rows: list[list[str]]) -> list[str]:
    """Aligned columns; a label too long for 80 columns gets a line of its own."""
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(rows[0]))]
    room = 80 - sum(widths) - 2 * len(widths)
    label = max(6, min(max(len(row[0]) for row in rows), room))
    lines = []
    for row in rows:
        tail = "".join(f"  {cell:<{w}}" if "[" in rows[0][i + 1] else f"  {cell:>{w}}" for i, (cell, w) in enumerate(zip(row[1:], widths)))
        lines += [f"{row[0]:<{label}}{tail}"] if len(row[0]) <= label else [row[0], " " * label + tail]
    return [line.rstrip() for line in lines]
