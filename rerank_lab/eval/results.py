"""results.json as dataclasses: `write` makes the file's text, `read` parses the file or says what is wrong with it.

A field has its own name in the file, or the name in its metadata. Some names in the file depend on the run; only this module makes and reads them:
`recall@K` has the number of candidates, `oracle_MEASURE` and `delta_MEASURE` have the first measure.
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
from rerank_lab.files import DecodeError, Json, decode, encode, json_name, read_versioned
from rerank_lab.timing import PHASES

RESULTS_SCHEMA = 2
RUN_AGAIN = "run the evaluation again with --overwrite"
Interval = list[float]  # lower and upper end of a 95% interval


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one query: median and 95th percentile."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Versus:
    """A row compared with the baseline on the first measure, paired by query.

    Attributes:
        baseline: its label.
        delta, ci95: mean difference, and its 95% interval; None for a single query.
        p_t: p-value of the paired t-test; None: undefined.
        p_randomization: p-value of the randomisation test.
        wins, ties, losses: numbers of queries.
        p_holm: p_randomization after Holm's correction over all rows.
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
    """How far two rankings of the same candidates agree.

    Attributes:
        other: what the row is compared with.
        queries: number of queries that both ranked.
        kendall_tau, overlap_at_10: means over queries; None: undefined.
        max_score_diff: the largest over queries; None: undefined.
    """

    other: str = json_name("with")
    queries: int
    kendall_tau: float | None
    overlap_at_10: float | None = json_name("overlap@10")
    max_score_diff: float | None


@dataclass(frozen=True)
class Change:
    """What changes when the same ranking is computed in another way.

    Attributes:
        measure: the measure of delta: the first of --measures.
        delta, ci95: mean difference, and its 95% interval.
        agreement: of the two rankings; None: nothing was compared.
    """

    measure: str
    delta: float
    ci95: Interval | None
    agreement: Agreement | None = None


@dataclass(frozen=True)
class ColdSample:
    """How many queries were timed with every document new, and when."""

    queries: int
    measured: str = "not measured"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one collection. Costs are for documents seen before; those called cold are for documents that are all new.

    Attributes:
        label: the row's name.
        queries, timed_queries: number of judged queries, and of those among them that have candidates.
        measures, ci95: measure → mean over the judged queries, and its 95% interval.
        vs: comparison with the baseline; None: this row is the baseline.
        agreement: of a server's row with the row that runs the same method here.
        vs_fp32: the change against torch in fp32, if another runtime or precision ranked.
        vs_definition: dtype → the change that the kernels make against their definition in fp32.
        settings: the method's settings, as they were set.
        in_use: the number of each setting that was set to a word: tau, where it was "auto".
        phases_ms, cold_phases_ms: median milliseconds by phase.
        docs_per_s, peak_rss_mb, flops_per_query: throughput, memory in MiB, FLOPs by formula; None: unknown, for a server's row.
        coverage, unjudged_share, truncated_share, tie_rate: shares, 0 to 1.
        token_limit: the most tokens of a document that are read; None: unknown.
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
    settings: dict[str, float | str]
    in_use: dict[str, float] = field(default_factory=dict)
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
        """The label, parsed."""
        return System.parse(self.label)

    def setting(self, name: str) -> float:
        """A setting as a number, the one that ranked."""
        return float(self.in_use.get(name, self.settings[name]))


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """A row under one value of a swept setting. Recall and ceiling are over the documents that the method ranked."""

    setting: str
    value: float | str
    label: str = json_name("method")
    queries: int = 0
    measures: dict[str, float]
    ci95: dict[str, Interval | None] = field(default_factory=dict)
    recall: float
    ceiling: float = json_name("oracle_")  # the mean of Results.ceiling_measure for the best order of these documents
    latency_ms: Latency | None = None
    flops_per_query: float | None = None
    truncated_share: float


@dataclass(frozen=True, kw_only=True)
class CandidateFacts:
    """Facts about the first stage and its candidates.

    Attributes:
        source: name of the first stage; `details` has its parameters.
        top_k: the most candidates that a query can have.
        hash: SHA-256 over query and document ids in order.
        documents_per_query: mean number of candidates; None: not recorded.
        recall: at top_k.
        ceiling: the mean of Results.ceiling_measure for the candidates in their best order.
        measures: measure → mean for the first stage's own order.
        notes: what a reader of the results should know.
        details: everything else that the first stage says about itself.
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
        options: the whole configuration, by the options' long names. The other fields are the options that code reads by name.
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
        """The configuration with these options."""
        return decode(cls, {**options, "options": options})


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """Facts about the collection: its hash, its counts, and notes for a reader of the results."""

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
        models: names, hashes and settings that identify the models.
        files: name → SHA-256 of the files that belong to these results.
        ceiling_measure: the measure of all ceilings: the first of --measures, or nDCG@10 in files of earlier releases.
    """

    environment: Environment
    config: Config
    dataset: DatasetFacts
    models: dict[str, str | None]
    candidates: CandidateFacts
    rows: list[Row]
    sweeps: list[SweepPoint]
    files: dict[str, str] = field(default_factory=dict)
    ceiling_measure: str = ""

    @property
    def primary(self) -> str:
        """The first of --measures: the one that is tested, swept, checked and plotted."""
        return self.config.measures[0]


def read(path: Path) -> Results:
    """Reads a results.json.

    Raises:
        UserError: the file is missing, damaged, of another version or inconsistent; the message says what to do.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: no results folder, or an evaluation that never ended; python -m rerank_lab.eval makes one")
    value = read_versioned(path, RESULTS_SCHEMA, RUN_AGAIN)
    try:
        return parse(value)
    except DecodeError as problem:
        raise UserError(f"{path}: {problem}; {RUN_AGAIN}") from None


def parse(value: Any) -> Results:
    """Makes results from the JSON of a file of this schema.

    Raises:
        DecodeError: something is missing, has the wrong type, or contradicts the rest.
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
        if not row["in_use"]:
            del row["in_use"]
        row["vs_fp32"] = row["vs_fp32"] and _flat_change(row["vs_fp32"])
        row["vs_definition"] = row["vs_definition"] and {name: _flat_change(change) for name, change in row["vs_definition"].items()}
    if value["environment"]["executor"] is None:
        del value["environment"]["executor"]
    return json.dumps({"schema": RESULTS_SCHEMA, **value}, indent=1, allow_nan=False) + "\n"


def _renamed(value: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): inner for key, inner in value.items()}


def _flat_change(change: dict[str, Any]) -> dict[str, Any]:
    return {f"delta_{change['measure'].lower()}": change["delta"], "ci95": change["ci95"], **(change["agreement"] or {})}


def _plain(value: Any) -> Any:
    """Replaces the run-dependent names in a file's JSON by the fields' names. A value that is not an object is left for `decode` to refuse."""
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
    """A measure's name, from the name in lower case."""
    return next((name for name in [*measures, "nDCG@10"] if name.lower() == lower), lower)


def _inconsistent(results: Results) -> Iterator[str]:
    """Yields every contradiction between parts of the results."""
    labels, config = [row.label for row in results.rows], results.config
    if not labels or labels != config.methods or config.baseline not in labels:
        yield f"its rows ({', '.join(labels)}) are not those of its configuration"
    for row in results.rows:
        if (row.vs is None) != (row.label == config.baseline) or not config.measures or {*config.measures} != {*row.measures}:
            yield f"the row of {row.label} does not fit its configuration"
        if phases := [p for p in (row.phases_ms, row.cold_phases_ms) if p is not None and {*p} != {*PHASES}]:
            yield f"the row of {row.label} has the phases {', '.join(phases[0])}"
