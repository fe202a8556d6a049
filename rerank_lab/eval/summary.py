"""Turns ranked queries into the files of an evaluation: results.json, per_query.csv, scores.parquet and runs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from rerank_lab.datasets.dataset import Dataset, Qrels
from rerank_lab.datasets.runs import Ranked, Run, tie_rate, trec_lines
from rerank_lab.engine import spread_in
from rerank_lab.environment import Environment
from rerank_lab.eval.journal import RESULTS, file_name
from rerank_lab.eval.records import Cost, KernelRecords, Record, RowRecords
from rerank_lab.eval.results import Agreement, CandidateFacts, Change, ColdSample, Config, DatasetFacts, Latency, Results, Row, SweepPoint, Versus, write
from rerank_lab.eval.sweep import SweepRecords
from rerank_lab.eval.system import System
from rerank_lab.first_stage.candidates import Candidates, oracle
from rerank_lab.measures import stats
from rerank_lab.measures.quality import counted_grades, coverage, measure_run, unjudged_share
from rerank_lab.timing import PHASES

AGREEMENT = ["kendall_tau", "overlap@10", "max_score_diff"]


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and where.

    Attributes:
        environment: the machine that ran the models.
        config: the effective configuration.
        models: names, hashes and settings that identify the models.
        dataset, candidates: what was ranked.
        systems: label → system, in the order of the rows.
    """

    environment: Environment
    config: Config
    models: dict[str, str | None]
    dataset: Dataset
    candidates: Candidates
    systems: Mapping[str, System]

    @property
    def primary(self) -> str:
        """The first of --measures."""
        return self.config.measures[0]

    def measured(self, records: Sequence[Record]) -> np.ndarray:
        """The value of the first measure for each judged query."""
        values: np.ndarray = measure_run(run_of(records), self.dataset.qrels, [self.primary])[self.primary].to_numpy()
        return values

    def ceiling(self, run: Run) -> float:
        """The mean of the first measure if each query's documents were in the best order for it."""
        best = oracle(run, replace(self.dataset, qrels=counted_grades(self.primary, self.dataset.qrels)))
        return float(measure_run(best, self.dataset.qrels, [self.primary])[self.primary].mean())


def summarize(evaluation: Evaluation, collected: Mapping[str, RowRecords], points: Sequence[SweepRecords] = ()) -> tuple[Results, dict[str, str | bytes]]:
    """Computes measures, tests and costs of all systems.

    Args:
        evaluation: what was evaluated.
        collected: label → what was ranked and timed for the row.
        points: what was ranked for --sweep.

    Returns:
        the results, and the content of every file of the results folder by name.
    """
    config, dataset, systems = evaluation.config, evaluation.dataset, evaluation.systems
    runs = {label: run_of(row.records) for label, row in collected.items()}
    frames = {label: measure_run(run, dataset.qrels, config.measures) for label, run in runs.items()}
    agreed = {
        label: _agreement(row.records, collected[systems[label].twin].records if systems[label].twin in collected else [])
        for label, row in collected.items()
        if systems[label].remote
    }
    tests = _tests(evaluation, frames)
    result = Results(
        environment=evaluation.environment,
        config=config,
        dataset=DatasetFacts(
            name=dataset.name, split=dataset.split, hash=dataset.hash, notes=dataset.notes, documents=len(dataset.corpus),
            details={name: value for name, value in dataset.facts.items() if name != "documents"},
        ),
        models=evaluation.models,
        candidates=_candidates(evaluation),
        rows=[_row(evaluation, system, frames[label], runs[label], collected[label], tests.get(label), agreed.get(label)) for label, system in systems.items()],
        sweeps=[_point(evaluation, point) for point in points],
        ceiling_measure=evaluation.primary,
    )  # fmt: skip
    none = _agreement([], []) if agreed else None  # if one row has these columns, all rows need them
    per_query = pd.concat([_per_query(label, frames[label], collected[label].records, agreed.get(label, none)) for label in systems], ignore_index=True)
    files: dict[str, str | bytes] = {f"runs/{file_name(label)}.trec": "".join(trec_lines(run, file_name(label))) for label, run in runs.items()}
    beside = {"per_query.csv": per_query.to_csv(index=False).encode(), "scores.parquet": _scores(collected, evaluation.candidates, dataset.qrels)}
    result = replace(result, files={name: hashlib.sha256(content).hexdigest() for name, content in beside.items()})
    return result, files | beside | {RESULTS: write(result)}


def run_of(records: Sequence[Record]) -> Run:
    """The rankings in these records."""
    return {r.query: Ranked(r.documents, np.array(r.scores, dtype=np.float32)) for r in records}


def _candidates(evaluation: Evaluation) -> CandidateFacts:
    """Facts about the first stage and its candidates."""
    candidates, names, qrels = evaluation.candidates, evaluation.config.measures, evaluation.dataset.qrels
    top_k = candidates.top_k
    first = measure_run(candidates.run, qrels, [*dict.fromkeys([*names, f"R@{top_k}"])]).mean()
    return CandidateFacts(
        source=candidates.source, top_k=top_k, hash=candidates.hash, documents_per_query=candidates.documents_per_query, recall=float(first[f"R@{top_k}"]), ceiling=evaluation.ceiling(candidates.run),
        measures={name: float(first[name]) for name in names}, notes=candidates.notes, details=candidates.details,
    )  # fmt: skip


def _tests(evaluation: Evaluation, frames: Mapping[str, pd.DataFrame]) -> dict[str, Versus]:
    """Label → comparison with the baseline, for all rows but the baseline's."""
    primary, baseline, seed = evaluation.primary, evaluation.config.baseline, evaluation.config.seed
    base = frames[baseline][primary].to_numpy()
    paired = {label: stats.paired(frames[label][primary].to_numpy(), base, seed) for label in evaluation.systems if label != baseline}
    holm = stats.holm([test["p_randomization"] for test in paired.values()])
    return {label: Versus(baseline=baseline, measure=primary, **test, p_holm=p) for (label, test), p in zip(paired.items(), holm)}


def _row(
    evaluation: Evaluation, system: System, frame: pd.DataFrame, run: Run, own: RowRecords, vs: Versus | None, agreed: pd.DataFrame | None
) -> Row:  # fmt: skip
    config, dataset, seed, records, cold = evaluation.config, evaluation.dataset, evaluation.config.seed, own.records, own.cold
    costs = costs_of(records)
    # A server is asked for the models by the names that were given. Models that are loaded here have full names.
    model, model_cross = (config.model, config.model_cross) if system.remote else (evaluation.models["model"], evaluation.models["model_cross"])
    seconds = [r.seconds for r in records]
    ranked = sum(r.candidates for r in records)
    return Row(
        dataset=dataset.name,
        split=dataset.split,
        label=system.label,
        model=model if "bi-encoder" in system.method.roles else None,
        model_cross=model_cross if system.crossed else None,
        queries=len(frame),
        timed_queries=len(records),
        measures={name: float(frame[name].mean()) for name in frame},
        ci95={name: stats.bootstrap_interval(frame[name].to_numpy(), seed) for name in frame},
        vs=vs,
        agreement=_mean_agreement(system.twin, agreed),
        vs_fp32=None if own.exact is None else _change(evaluation, records, own.exact, "torch, fp32"),
        vs_definition=None if own.kernels is None else _vs_definition(evaluation, own.kernels),
        settings=system.recorded(config.max_tokens_per_doc),
        in_use={} if system.remote else system.method.in_use(spread_in(evaluation.models)),
        latency_ms=_latency(seconds),
        cold_latency_ms=_latency(cold.seconds),
        cold_sample=ColdSample(len(cold.seconds), cold.measured),
        phases_ms=_phases([cost.phases for cost in costs]),
        cold_phases_ms=_phases(cold.phases),
        docs_per_s=ranked / float(np.sum(seconds)) if records else None,
        cold_docs_per_s=cold.documents / sum(cold.seconds) if cold.seconds else None,
        peak_rss_mb=max((cost.peak_rss_mb for cost in costs), default=None if system.remote else 0.0),
        cold_peak_rss_mb=cold.peak_rss_mb,
        flops_per_query=float(np.mean([cost.flops for cost in costs])) if costs else None,
        cold_flops_per_query=float(np.mean([cost.flops + cost.flops_new for cost in costs])) if costs else None,
        coverage=coverage(run, dataset.qrels),
        unjudged_share=unjudged_share(run, dataset.qrels),
        token_limit=own.token_limit,
        truncated_share=None if system.remote else sum(cost.truncated for cost in costs) / max(1, ranked),
        tie_rate=tie_rate(run),
    )


def costs_of(records: Sequence[Record]) -> list[Cost]:
    """The costs that are known."""
    return [r.cost for r in records if r.cost is not None]


def _agreement(records: Sequence[Record], others: Sequence[Record]) -> pd.DataFrame:
    """stats.agreement of the relevance scores: one row for each query that both ranked."""
    other = {r.query: dict(zip(r.documents, r.relevance)) for r in others}
    found = {r.query: stats.agreement(dict(zip(r.documents, r.relevance)), other[r.query]) for r in records if r.query in other}
    return pd.DataFrame(list(found.values()), index=pd.Index(list(found), name="query", dtype=object), columns=AGREEMENT, dtype=np.float64)


def _mean_agreement(other: str, agreed: pd.DataFrame | None) -> Agreement | None:
    """Means over queries, and the largest max_score_diff; None if nothing was compared."""
    if agreed is None or agreed.empty:
        return None
    values = (agreed[name].max() if name == "max_score_diff" else agreed[name].mean() for name in AGREEMENT)
    tau, overlap, gap = (None if np.isnan(value) else float(value) for value in values)
    return Agreement(other=other, queries=len(agreed), kendall_tau=tau, overlap_at_10=overlap, max_score_diff=gap)


def _change(evaluation: Evaluation, own: Sequence[Record], other: Sequence[Record], name: str) -> Change:
    """How the first measure and the scores differ between two ways to compute the same rankings."""
    difference = evaluation.measured(own) - evaluation.measured(other)
    interval = stats.bootstrap_interval(difference, evaluation.config.seed)
    return Change(evaluation.primary, float(difference.mean()), interval, _mean_agreement(name, _agreement(own, other)))


def _vs_definition(evaluation: Evaluation, kernels: KernelRecords) -> dict[str, Change]:
    """Dtype → how the kernels in that dtype differ from their definition in fp32 on the same vectors."""
    return {name: _change(evaluation, records, kernels.definition, "definition, fp32") for name, records in kernels.by_dtype.items()}


def _point(evaluation: Evaluation, point: SweepRecords) -> SweepPoint:
    """One point of a sweep. Recall and ceiling are over the documents that the method ranked."""
    run, qrels, primary, costs = run_of(point.records), evaluation.dataset.qrels, evaluation.primary, costs_of(point.records)
    frame = measure_run(run, qrels, evaluation.config.measures)
    depth = max((len(r.documents) for r in run.values()), default=1)
    ranked = sum(r.candidates for r in point.records)
    return SweepPoint(
        setting=point.setting, value=point.value, label=point.label, queries=len(frame),
        measures={name: float(frame[name].mean()) for name in frame},
        ci95={primary: stats.bootstrap_interval(frame[primary].to_numpy(), evaluation.config.seed)},
        recall=float(measure_run(run, qrels, [f"R@{depth}"]).iloc[:, 0].mean()),
        ceiling=evaluation.ceiling(run),
        latency_ms=_latency([r.seconds for r in point.records]),
        flops_per_query=float(np.mean([cost.flops for cost in costs])) if costs else None,
        truncated_share=sum(cost.truncated for cost in costs) / max(1, ranked),
    )  # fmt: skip


def _phases(phases: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Median milliseconds over queries, by phase."""
    return {p: 1000 * float(np.median([seconds.get(p, 0.0) for seconds in phases])) for p in PHASES} if phases else None


def _latency(seconds: Sequence[float]) -> Latency | None:
    return Latency(*(1000 * float(np.percentile(seconds, q)) for q in (50, 95))) if seconds else None


def _per_query(label: str, frame: pd.DataFrame, records: Sequence[Record], agreed: pd.DataFrame | None) -> pd.DataFrame:
    cost = pd.DataFrame(
        [
            {"query": r.query, "candidates": r.candidates, "latency_ms": 1000 * r.seconds}
            | {f"{p}_ms": 1000 * s for p, s in ({} if r.cost is None else r.cost.phases).items()}
            for r in records
        ],
        columns=["query", "candidates", "latency_ms", *(f"{p}_ms" for p in PHASES)],
    ).set_index("query")
    joined = frame.join(cost) if agreed is None else frame.join(cost).join(agreed)
    joined["candidates"] = joined["candidates"].fillna(0).astype(int)
    joined.insert(0, "method", label)
    return joined.reset_index()


EMPTY_SCORES = pd.DataFrame(
    {name: pd.Series(dtype=kind) for name, kind in {
        "method": str, "query": str, "document": str, "rank": np.int32, "score": np.float32, "relevance": np.float64, "first_stage": np.float32, "grade": "Int32",
    }.items()}
)  # fmt: skip


def _scores(collected: Mapping[str, RowRecords], candidates: Candidates, qrels: Qrels) -> bytes:
    parts = []
    for label, row in collected.items():
        for r in row.records:
            ranked = candidates.run[r.query]
            first = dict(zip(ranked.documents, ranked.scores))
            columns = {
                "method": label,
                "query": r.query,
                "document": r.documents,
                "rank": np.arange(1, len(r.documents) + 1, dtype=np.int32),
                "score": np.array(r.scores, dtype=np.float32),
                "relevance": np.array(r.relevance, dtype=np.float64),
                "first_stage": np.array([first[d] for d in r.documents], dtype=np.float32),
                "grade": pd.array([qrels[r.query].get(d) for d in r.documents], dtype="Int32"),  # null: not judged
            }
            parts.append(pd.DataFrame(columns))
    buffer = io.BytesIO()
    (pd.concat(parts, ignore_index=True) if parts else EMPTY_SCORES).to_parquet(buffer, index=False)
    return buffer.getvalue()
