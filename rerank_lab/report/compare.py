"""The page of --compare: two evaluations of the same candidates, what changed between them, and whether that changed the ranking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rerank_lab.errors import UserError
from rerank_lab.eval.results import Row, Versus
from rerank_lab.eval.table import ALPHA, interval, p_text
from rerank_lab.files import Json, encode
from rerank_lab.measures import stats
from rerank_lab.report import figures
from rerank_lab.report.blocks import Block, Cell, Code, Paragraph, Plot, Plots, Section, Strong, Table
from rerank_lab.report.content import command, number
from rerank_lab.report.load import ResultsFolder


@dataclass(frozen=True)
class PairedRow:
    """A row that both evaluations have.

    Attributes:
        before, after: means in A and in B.
        changes: B minus A, for each query.
        vs: B tested against A, corrected over all such rows.
        latency: B's median latency divided by A's; None: they cannot be compared.
    """

    before: float
    after: float
    changes: np.ndarray
    vs: Versus
    latency: float | None


def compared(a: ResultsFolder, b: ResultsFolder) -> dict[str, PairedRow]:
    """Label → paired test of b against a on a's first measure, for each row that both have.

    Raises:
        UserError: collections or candidates differ, or there is no common measure or row.
    """
    hashes = {"collection": (a.result.dataset.hash, b.result.dataset.hash), "candidates": (a.result.candidates.hash, b.result.candidates.hash)}
    for what, (own, others) in hashes.items():
        if own != others:
            raise UserError(
                f"{a.folder} and {b.folder} are no pair: the hash of their {what} differs ({own[:16]}, {others[:16]}), and paired tests need the same"
            )
    labels, primary = [label for label in a.rows if label in b.rows], a.primary
    if not labels:
        raise UserError(f"no method is in both: {a.folder} has {', '.join(a.rows)}, {b.folder} has {', '.join(b.rows)}")
    if primary not in b.result.config.measures:
        raise UserError(f"{b.folder} has no {primary}, which {a.folder} tests; its measures are {', '.join(b.result.config.measures)}")
    values: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for label in labels:
        one, other = a.measure(label), b.measure(label, primary)
        if {*one.index} != {*other.index}:
            raise UserError(f"{a.folder} and {b.folder} are no pair: {len({*one.index} ^ {*other.index})} judged queries are in one of them alone")
        values[label] = (one.to_numpy(), other[one.index].to_numpy())
    tested = [stats.paired(after, before, a.seed) for before, after in values.values()]
    corrected = stats.holm([test["p_randomization"] for test in tested])
    return {
        label: PairedRow(
            float(before.mean()), float(after.mean()), after - before, Versus(baseline=label, measure=primary, p_holm=p, **test),
            _ratio(a.rows[label], b.rows[label]) if _same_machine(a, b) else None,
        )
        for (label, (before, after)), test, p in zip(values.items(), tested, corrected)
    }  # fmt: skip


def comparison(a: ResultsFolder, b: ResultsFolder, made_by: str) -> Section:
    """The page about b against a; made_by is the command that made it."""
    tests, measure = compared(a, b), a.primary
    name = a.result.dataset.name
    title = f"{name}: {a.folder.resolve().name} against {b.folder.resolve().name}"
    rows = [
        [
            Cell(label), number(one.before, ".4f"), number(one.after, ".4f"), Cell(interval(vs.delta, vs.ci95, "+.4f", "+.4f"), vs.delta),
            number(vs.p_t, ".3g"), Cell(p_text(vs.p_holm), vs.p_holm), Cell(f"{vs.wins}/{vs.ties}/{vs.losses}", vs.wins), number(one.latency, ".2f"),
        ]
        for label, one in tests.items()
        for vs in [one.vs]
    ]  # fmt: skip
    head = ["method", f"{measure}, A", f"{measure}, B", "B − A [95% CI]", "p, t-test", "p, Holm", "won/tied/lost", "latency, B over A"]
    alone = [f"{label} ran in {side} alone" for side, one, other in (("A", a, b), ("B", b, a)) for label in one.rows if label not in other.rows]
    forest = figures.forest({label: one.vs for label, one in tests.items()}, measure, name, "A", a.rows)
    strips = figures.strips({label: one.changes for label, one in tests.items()}, measure, name, "A", a.rows)
    counted = "; ".join(f"{label} {one.vs.wins} won, {one.vs.ties} tied, {one.vs.losses} lost" for label, one in tests.items())
    summary = "; ".join(f"{label} {interval(one.vs.delta, one.vs.ci95, '+.4f', '+.4f')}" for label, one in tests.items())
    same = f"Same collection ({a.result.dataset.hash[:16]}) and candidates ({a.result.candidates.hash[:16]}), by their hashes."
    blocks: list[Block] = [
        *(Paragraph(_sentence(label, one), item=len(tests) > 1) for label, one in tests.items()),
        Paragraph([f"A is {a.folder}, B is {b.folder}. {same}"]),
        Table(head, rows),
        Plots([Plot("comparison", forest, f"differences of B from A: {summary}"), Plot("comparison-queries", strips, f"sorted by query: {counted}")]),
        *(Paragraph([line], item=True) for line in alone),
        *([] if _same_machine(a, b) else [Paragraph(["Their latencies are of different machines or settings of one (below), and not compared."], item=True)]),
        Section("What changed", 2, [_changes(a, b)]),
        Section("Made by", 2, [Code(made_by), Paragraph([f"A: {command(a.result.config.options)}"]), Paragraph([f"B: {command(b.result.config.options)}"])]),
    ]
    return Section(title, 1, blocks)


def _sentence(label: str, one: PairedRow) -> list[str]:
    vs = one.vs
    if vs.wins == vs.losses == 0:
        verb = f" is the same in both: no query's {vs.measure} differs"
    else:
        way = "is better in B" if vs.delta > 0 else "is worse in B"
        change = interval(vs.delta, vs.ci95, "+.4f", "+.4f")
        verb = f" {'cannot be told apart' if vs.p_holm >= ALPHA else way}: {change} {vs.measure}, Holm p {p_text(vs.p_holm)}"
    return [Strong(label), verb, "" if one.latency is None else f", at {one.latency:.2f} × A's median latency", "."]


def _same_machine(a: ResultsFolder, b: ResultsFolder) -> bool:
    return timed_on(a) == timed_on(b)


def timed_on(one: ResultsFolder) -> dict[str, str]:
    """Facts about machine and executor that must be equal if latencies are to be compared."""
    found = one.result.environment
    executor = f"{found.executor.name} with {found.executor.workers} workers" if found.executor else "local"
    return {"cpu": found.cpu, "cpus": str(found.cpus), "threads": str(found.threads), "device": found.device, "executor": executor}


def _ratio(a: Row, b: Row) -> float | None:
    return b.latency_ms.p50 / a.latency_ms.p50 if a.latency_ms and b.latency_ms else None


def _changes(a: ResultsFolder, b: ResultsFolder) -> Block:
    """A table of everything that differs in configuration, models and environment."""
    rows: list[list[Cell]] = []
    for part in ("config", "models", "environment"):
        one, other = (_stated(x)[part] for x in (a, b))
        rows += [
            [Cell(f"{part}: {key}"), Cell(one.get(key, "absent"), quoted=True), Cell(other.get(key, "absent"), quoted=True)]
            for key in sorted({*one, *other})
            if one.get(key) != other.get(key)
        ]
    return Table(["what", "A", "B"], rows, kind="wide") if rows else Paragraph(["Nothing of configuration, models and environment."])


def _stated(one: ResultsFolder) -> dict[str, dict[str, str]]:
    return {"config": flat(one.result.config.options), "models": flat(one.result.models), "environment": environment(one)}


def environment(one: ResultsFolder) -> dict[str, str]:
    """Facts about machine and software, with names as `flat` makes them. Facts about executors are left out if the results have none."""
    found = one.result.environment
    without = {name for name, value in (("executor", found.executor), ("timed_by", found.timed_by)) if not value}
    return flat({key: value for key, value in encode(found).items() if key not in without})


def flat(value: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings: names joined by dots → values as text."""
    found: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner if isinstance(inner, str) else json.dumps(inner)
    return found
