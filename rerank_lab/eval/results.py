"""results.json as dataclasses: `write` gives the file's text, `read` takes it back or says what is wrong with it.

A field stands in the file under its own name, or under the one that its metadata gives. Names that depend on the run are made and read here alone:
`recall@K` after the number of candidates, `oracle_MEASURE` and `delta_MEASURE` after the first measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from rerank_lab.environment import Environment
from rerank_lab.errors import UserError
from rerank_lab.eval.system import System
from rerank_lab.files import DecodeError, Json, decode, encode, json_name
from rerank_lab.timing import PHASES

SCHEMA = 2
AGAIN = "run the evaluation again with --overwrite"
Interval = list[float]  # low and high end, 95%


@dataclass(frozen=True)
class Latency:
    """Milliseconds a query."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Versus:
    """A row against the baseline on the first measure, paired by query.

    Attributes:
        delta, ci95: mean difference and its 95% interval; None for a single query.
        p_t, p_randomization, p_holm: of the paired t-test, the randomisation test, and the latter after Holm's correction over all rows.
        wins, ties, losses: queries.
    """

    baseline: str
    measure: str
    delta: float
    ci95: Interval | None
    p_t: float | None
    p_randomization: float
    wins: int
    ties: int
    losses: int
    p_holm: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two rankings of the same candidates agree: means over queries, of max_score_diff the largest; None: undefined.

    Attributes:
        other: what a row is compared with.
        queries: that both ranked.
    """

    other: str = json_name("with")
    queries: int
    kendall_tau: float | None
    overlap_at_10: float | None = json_name("overlap@10")
    max_score_diff: float | None


@dataclass(frozen=True)
class Change:
    """What another way to compute the same ranking changes.

    Attributes:
        measure: that delta is of, the first of --measures.
        delta, ci95: mean difference and its 95% interval.
        agreement: of the two rankings; None where nothing was compared.
    """

    measure: str
    delta: float
    ci95: Interval | None
    agreement: Agreement | None = None


@dataclass(frozen=True)
class ColdSample:
    """Queries that were timed with every document new, and when."""

    queries: int
    measured: str = "not measured"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one collection. Times are of documents seen before, those called cold of documents that are all new.

    Attributes:
        label: names the row.
        queries, timed_queries: judged, and those among them that have candidates.
        measures, ci95: measure → mean over the judged queries, and its 95% interval.
        vs: against the baseline; None: it is the baseline.
        agreement: of a server's row with the row that does the same here.
        vs_fp32: under another runtime or precision than torch in fp32, against that.
        vs_definition: type of number → what the kernels change against their definition in fp32.
        settings: effective ones.
        phases_ms, cold_phases_ms: medians by phase.
        docs_per_s, peak_rss_mb, flops_per_query: throughput, MiB, and FLOPs by formula; None: not known (a server's).
        coverage, unjudged_share, truncated_share, tie_rate: shares, 0 to 1.
        token_limit: own tokens of a document that are read; None: not known.
    """

    dataset: str = ""
    split: str = ""
    label: str = json_name("method")
    model: str | None = None
    model_cross: str | None = None
    queries: int
    timed_queries: int
    measures: dict[str, float]
    ci95: dict[str, Interval | None]
    vs: Versus | None
    agreement: Agreement | None = None
    vs_fp32: Change | None = None
    vs_definition: dict[str, Change] | None
    settings: dict[str, float]
    latency_ms: Latency | None
    cold_latency_ms: Latency | None
    cold_sample: ColdSample
    phases_ms: dict[str, float] | None
    cold_phases_ms: dict[str, float] | None
    docs_per_s: float | None
    cold_docs_per_s: float | None
    peak_rss_mb: float | None
    cold_peak_rss_mb: float | None
    flops_per_query: float | None
    cold_flops_per_query: float | None
    coverage: float
    unjudged_share: float
    token_limit: int | None
    truncated_share: float | None
    tie_rate: float

    @cached_property
    def system(self) -> System:
        """The label, taken apart."""
        return System.parse(self.label)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A row under one value of a swept setting; recall and ceiling are of the documents that the method ranked."""

    setting: str
    value: float
    label: str = json_name("method")
    queries: int = 0
    measures: dict[str, float]
    ci95: dict[str, Interval | None] = field(default_factory=dict)
    recall: float
    ceiling: float = json_name("oracle_")  # of the best order of these documents, by the measure that Results.ceiling_measure names
    latency_ms: Latency | None = None
    flops_per_query: float | None = None
    truncated_share: float


@dataclass(frozen=True, kw_only=True)
class CandidateFacts:
    """What the first stage handed over.

    Attributes:
        source: of the first stage, with its parameters in `details`.
        top_k: candidates a query at most.
        recall: at top_k.
        ceiling: of the candidates in their best order, by the measure that Results.ceiling_measure names.
        measures: measure → mean of the first stage's own order.
        hash: SHA-256 over query and document ids in order.
        notes: what a reader should know.
        documents_per_query: mean; None: not said.
        details: what else the first stage says of itself.
    """

    source: str
    top_k: int
    hash: str
    documents_per_query: float | None = None
    recall: float = json_name("recall@")
    ceiling: float = json_name("oracle_")
    measures: dict[str, float]
    notes: list[str]
    details: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The effective configuration.

    Attributes:
        options: all of it, by the options' long names; the others are those that are looked at by name.
    """

    measures: list[str]
    baseline: str
    seed: int
    dataset: str
    split: str
    methods: list[str]
    model: str = ""
    model_cross: str = ""
    max_tokens_per_doc: int = 0
    options: dict[str, Json]

    @classmethod
    def of(cls, options: Mapping[str, Json]) -> Config:
        """The configuration that these options make."""
        return decode(cls, {**options, "options": options})


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """The collection: its hash, its counts, and what a reader should know."""

    name: str
    split: str
    hash: str
    notes: list[str]
    documents: int
    details: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation.

    Attributes:
        models: what identifies the models and their settings.
        files: name → SHA-256 of what belongs to it.
        ceiling_measure: what all ceilings are of: the first of --measures; nDCG@10 in files of earlier releases.
    """

    environment: Environment
    config: Config
    dataset: DatasetFacts
    models: dict[str, str | None]
    candidates: CandidateFacts
    rows: list[Row]
    sweeps: list[Point]
    files: dict[str, str] = field(default_factory=dict)
    ceiling_measure: str = ""

    @property
    def primary(self) -> str:
        """The measure that is tested, swept, checked and plotted: the first of --measures."""
        return self.config.measures[0]


def read(path: Path) -> Results:
    """A results.json.

    Raises:
        UserError: it is not there, damaged, of another version, or does not agree with itself; the message says what to do.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: no results folder, or an evaluation that never ended; python -m rerank_lab.eval makes one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); {AGAIN}") from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA or type(schema) is not int:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise UserError(f"{path}: schema {schema!r}, and this version reads schema {SCHEMA}; {'a newer rerank_lab made it: upgrade' if newer else AGAIN}")
    try:
        return parse(value)
    except DecodeError as problem:
        raise UserError(f"{path}: {problem}; {AGAIN}") from None


def parse(value: Any) -> Results:
    """Results from the JSON of a file of this schema.

    Raises:
        DecodeError: something is missing, of another kind, or does not fit the rest.
    """
    results = decode(Results, _plain(value))
    for problem in _inconsistent(results):
        raise DecodeError(problem)
    return results


def write(results: Results) -> str:
    """The text of results.json."""
    value = encode(results)
    measure, top_k = value.pop("ceiling_measure").lower(), results.candidates.top_k
    value["dataset"] |= value["dataset"].pop("details")
    value["config"] = dict(results.config.options)
    first = value["candidates"]
    value["candidates"] = {"source": first.pop("source"), **first.pop("details")} | _renamed(
        first, {"oracle_": f"oracle_{measure}", "recall@": f"recall@{top_k}"}
    )
    value["sweeps"] = [_renamed(point, {"oracle_": f"oracle_{measure}"}) for point in value["sweeps"]]
    for row in value["rows"]:
        row["vs_fp32"] = row["vs_fp32"] and _flat_change(row["vs_fp32"])
        row["vs_definition"] = row["vs_definition"] and {name: _flat_change(change) for name, change in row["vs_definition"].items()}
    if value["environment"]["executor"] is None:
        del value["environment"]["executor"]
    return json.dumps({"schema": SCHEMA, **value}, indent=1, allow_nan=False) + "\n"


def _renamed(value: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): inner for key, inner in value.items()}


def _flat_change(change: dict[str, Any]) -> dict[str, Any]:
    return {f"delta_{change['measure'].lower()}": change["delta"], "ci95": change["ci95"], **(change["agreement"] or {})}


def _plain(value: Any) -> Any:
    """The JSON of a file with the names that depend on the run replaced by those of the fields; what is no object stays for `decode` to refuse."""
    if not isinstance(value, dict):
        return value
    config = value.get("config")
    given = config.get("measures") if isinstance(config, dict) else None
    measures = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    found = dict(value)
    if isinstance(config, dict):
        found["config"] = {**config, "options": config}
    if isinstance(first := value.get("candidates"), dict):
        found["candidates"], ceiling = _ceiling(first, measures)
        found["ceiling_measure"] = ceiling
        recall = next((key for key in first if key.startswith("recall@")), "recall@")
        found["candidates"] = _renamed(found["candidates"], {recall: "recall@"})
    if isinstance(value.get("sweeps"), list):
        found["sweeps"] = [_ceiling(point, measures)[0] if isinstance(point, dict) else point for point in value["sweeps"]]
    if isinstance(value.get("rows"), list):
        found["rows"] = [_plain_row(row, measures) if isinstance(row, dict) else row for row in value["rows"]]
    for part, kind in (("dataset", DatasetFacts), ("candidates", CandidateFacts)):
        if isinstance(inner := found.get(part), dict):
            known = {f.metadata.get("name", f.name) for f in fields(kind)}
            found[part] = {**inner, "details": {key: own for key, own in inner.items() if key not in known}}
    return found


def _ceiling(value: dict[str, Any], measures: list[str]) -> tuple[dict[str, Any], str]:
    key = next((key for key in value if key.startswith("oracle_")), "")
    return (_renamed(value, {key: "oracle_"}), _measure(key.removeprefix("oracle_"), measures)) if key else (value, "")


def _plain_row(row: dict[str, Any], measures: list[str]) -> dict[str, Any]:
    found, ways = dict(row), row.get("vs_definition")
    if isinstance(row.get("vs_fp32"), dict):
        found["vs_fp32"] = _plain_change(row["vs_fp32"], measures)
    if isinstance(ways, dict):
        found["vs_definition"] = {name: _plain_change(way, measures) if isinstance(way, dict) else way for name, way in ways.items()}
    return found


def _plain_change(change: dict[str, Any], measures: list[str]) -> dict[str, Any]:
    key = next((key for key in change if key.startswith("delta_")), "")
    found = _renamed(change, {key: "delta"})
    return found | {"measure": _measure(key.removeprefix("delta_"), measures), "agreement": change if "with" in change else None}


def _measure(lower: str, measures: list[str]) -> str:
    """A measure by its name in small letters."""
    return next((name for name in [*measures, "nDCG@10"] if name.lower() == lower), lower)


def _inconsistent(results: Results) -> Iterator[str]:
    """What parts of it say differently."""
    labels, config = [row.label for row in results.rows], results.config
    if not labels or labels != config.methods or config.baseline not in labels:
        yield f"its rows ({', '.join(labels)}) are not those of its configuration"
    for row in results.rows:
        if (row.vs is None) != (row.label == config.baseline) or not config.measures or {*config.measures} != {*row.measures}:
            yield f"the row of {row.label} does not fit its configuration"
        if phases := [p for p in (row.phases_ms, row.cold_phases_ms) if p is not None and {*p} != {*PHASES}]:
            yield f"the row of {row.label} has the phases {', '.join(phases[0])}"
