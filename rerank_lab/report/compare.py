"""Two evaluations of the same candidates: what changed between them, and whether it changed the ranking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rerank_lab import stats
from rerank_lab.errors import UserError
from rerank_lab.report import figures
from rerank_lab.report.blocks import Block, Cell, Code, Plot, Row, Section, Strong, Table, Text
from rerank_lab.report.content import command, number
from rerank_lab.report.load import Loaded
from rerank_lab.results import ALPHA, interval, p_text

MACHINE = ("cpu", "cpus", "threads", "device")  # of the environment: what latencies are compared within


def compared(a: Loaded, b: Loaded) -> dict[str, dict[str, Any]]:
    """Label → paired tests of b against a on a's first measure, for the methods that both ran.

    Raises:
        UserError: other collections or candidates, no measure or no method in common.
    """
    for what, key in (("collection", "dataset"), ("candidates", "candidates")):
        own, others = a.result[key]["hash"], b.result[key]["hash"]
        if own != others:
            raise UserError(
                f"{a.folder} and {b.folder} are no pair: the hash of their {what} differs ({own[:16]}, {others[:16]}), and paired tests need the same"
            )
    labels, primary = [label for label in a.rows if label in b.rows], a.primary
    if not labels:
        raise UserError(f"no method is in both: {a.folder} has {', '.join(a.rows)}, {b.folder} has {', '.join(b.rows)}")
    if primary not in b.result["config"]["measures"]:
        raise UserError(f"{b.folder} has no {primary}, which {a.folder} tests; its measures are {', '.join(b.result['config']['measures'])}")
    found: dict[str, dict[str, Any]] = {}
    for label in labels:
        one, other = a.measure(label), b.measure(label, primary)
        if {*one.index} != {*other.index}:
            raise UserError(f"{a.folder} and {b.folder} are no pair: {len({*one.index} ^ {*other.index})} judged queries are in one of them alone")
        before, after = one.to_numpy(), other[one.index].to_numpy()
        found[label] = stats.paired(after, before, a.seed) | {
            "before": float(before.mean()), "after": float(after.mean()), "changes": after - before,
            "latency": _ratio(a.rows[label], b.rows[label]) if _same_machine(a, b) else None,
        }  # fmt: skip
    for vs, p in zip(found.values(), stats.holm([vs["p_randomization"] for vs in found.values()])):
        vs["p_holm"] = p
    return found


def comparison(a: Loaded, b: Loaded, made_by: str) -> Section:
    """The report of two evaluations, b against a, and the command that made it."""
    tests, measure = compared(a, b), a.primary
    title = f"{a.result['dataset']['name']}: {a.folder.resolve().name} against {b.folder.resolve().name}"
    rows = [
        [
            Cell(label), number(vs["before"], ".4f"), number(vs["after"], ".4f"), Cell(interval(vs["delta"], vs["ci95"], "+.4f", "+.4f"), vs["delta"]),
            number(vs["p_t"], ".3g"), Cell(p_text(vs["p_holm"]), vs["p_holm"]), Cell(f"{vs['wins']}/{vs['ties']}/{vs['losses']}", vs["wins"]), number(vs["latency"], ".2f"),
        ]
        for label, vs in tests.items()
    ]  # fmt: skip
    head = ["method", f"{measure}, A", f"{measure}, B", "B − A [95% CI]", "p, t-test", "p, Holm", "won/tied/lost", "latency, B over A"]
    alone = [f"{label} ran in {side} alone" for side, one, other in (("A", a, b), ("B", b, a)) for label in one.rows if label not in other.rows]
    forest = figures.forest(tests, measure, a.result["dataset"]["name"], "A", list(a.rows))
    strips = figures.strips({label: vs["changes"] for label, vs in tests.items()}, measure, a.result["dataset"]["name"], "A")
    counted = "; ".join(f"{label} {vs['wins']} won, {vs['ties']} tied, {vs['losses']} lost" for label, vs in tests.items())
    said = "; ".join(f"{label} {interval(vs['delta'], vs['ci95'], '+.4f', '+.4f')}" for label, vs in tests.items())
    same = f"Same collection ({a.result['dataset']['hash'][:16]}) and candidates ({a.result['candidates']['hash'][:16]}), by their hashes."
    blocks: list[Block] = [
        *(Text(_sentence(label, vs, measure), item=len(tests) > 1) for label, vs in tests.items()),
        Text([f"A is {a.folder}, B is {b.folder}. {same}"]),
        Table(head, rows),
        Row([Plot("comparison", forest, f"differences of B from A: {said}"), Plot("comparison-queries", strips, f"sorted by query: {counted}")]),
        *(Text([line], item=True) for line in alone),
        *([] if _same_machine(a, b) else [Text(["Their latencies are of different machines or settings of one (below), and not compared."], item=True)]),
        Section("What changed", 2, [_changes(a, b)]),
        Section("Made by", 2, [Code(made_by), Text([f"A: {command(a.result['config'])}"]), Text([f"B: {command(b.result['config'])}"])]),
    ]
    return Section(title, 1, blocks)


def _sentence(label: str, vs: Mapping[str, Any], measure: str) -> list[str]:
    if vs["wins"] == vs["losses"] == 0:
        verb = f" is the same in both: no query's {measure} differs"
    else:
        way = "is better in B" if vs["delta"] > 0 else "is worse in B"
        verb = f" {'cannot be told apart' if vs['p_holm'] >= ALPHA else way}: {interval(vs['delta'], vs['ci95'], '+.4f', '+.4f')} {measure}, Holm p {p_text(vs['p_holm'])}"
    return [Strong(label), verb, "" if vs["latency"] is None else f", at {vs['latency']:.2f} × A's median latency", "."]


def _same_machine(a: Loaded, b: Loaded) -> bool:
    return timed_on(a) == timed_on(b)


def timed_on(one: Loaded) -> dict[str, str]:
    """What latencies are compared within: the processor, and who else was at work on it."""
    environment = one.result["environment"]
    cluster = environment.get("executor")
    return {key: str(environment[key]) for key in MACHINE} | {"executor": f"{cluster['name']} with {cluster['workers']} workers" if cluster else "local"}


def _ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
    return b["latency_ms"]["p50"] / a["latency_ms"]["p50"] if a["latency_ms"] and b["latency_ms"] else None


def _changes(a: Loaded, b: Loaded) -> Block:
    """Everything of configuration, models and environment that differs."""
    rows: list[list[Cell]] = []
    for part in ("config", "models", "environment"):
        one, other = (flat(x.result[part]) for x in (a, b))
        rows += [
            [Cell(f"{part}: {key}"), Cell(one.get(key, "absent"), quoted=True), Cell(other.get(key, "absent"), quoted=True)]
            for key in sorted({*one, *other})
            if one.get(key) != other.get(key)
        ]
    return Table(["what", "A", "B"], rows, kind="wide") if rows else Text(["Nothing of configuration, models and environment."])


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Names with dots → values as text, of what is nested."""
    found: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner if isinstance(inner, str) else json.dumps(inner)
    return found
