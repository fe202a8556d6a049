"""From ranked queries to what an evaluation leaves behind: results.json, per_query.csv, scores.parquet and runs."""

from __future__ import annotations

import hashlib
import io
import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from rerank_lab import stats
from rerank_lab.candidates import Candidates, oracle
from rerank_lab.datasets import Dataset, Qrels
from rerank_lab.endpoint import sent_settings, split_label
from rerank_lab.journal import RESULTS, file_name
from rerank_lab.kernel_check import DEFINITION, DTYPES
from rerank_lab.measures import coverage, evaluate, unjudged_share
from rerank_lab.methods import Method, runs_cross
from rerank_lab.run import Ranked, Run, tie_rate, trec_lines
from rerank_lab.sweep import Point
from rerank_lab.timing import PHASES

SCHEMA = 2
ALPHA = 0.05
AGREEMENT = ["kendall_tau", "overlap@10", "max_score_diff"]


def summarize(
    about: dict[str, Any], dataset: Dataset, candidates: Candidates, methods: dict[str, Method], collected: dict[str, dict[str, Any]],
    points: Sequence[Point] = (),
) -> tuple[dict[str, Any], dict[str, str | bytes]]:  # fmt: skip
    """Measures, tests and costs of all methods.

    Args:
        about: environment, config, dataset and models, as results.json keeps them.
        dataset, candidates: what was ranked.
        methods: label → method, in the order asked for.
        collected: label → {"records": one a query, "token_limit", "cold"}, and where there are any "exact" and "kernels".
        points: of --sweep.

    Returns:
        results.json as a dictionary, and every file of the folder by name.
    """
    config = about["config"]
    names, seed = config["measures"], config["seed"]
    runs = {label: _run(part["records"]) for label, part in collected.items()}
    frames = {label: evaluate(run, dataset.qrels, names) for label, run in runs.items()}
    agreed = {label: _agreement(part["records"], collected.get(_ours(label), {}).get("records", [])) for label, part in collected.items() if is_remote(label)}
    rows = [_row(label, methods[label], dataset, about, frames, runs[label], collected[label], agreed.get(label), seed) for label in methods]
    tested = [row for row in rows if row["vs"] is not None]
    for row, p in zip(tested, stats.holm([row["vs"]["p_randomization"] for row in tested])):
        row["vs"]["p_holm"] = p
    top_k = candidates.about["top_k"]
    first = evaluate(candidates.run, dataset.qrels, [*dict.fromkeys([*names, f"R@{top_k}"])]).mean()
    ceiling = float(evaluate(oracle(candidates.run, dataset), dataset.qrels, ["nDCG@10"])["nDCG@10"].mean())
    result = {
        "schema": SCHEMA,
        **about,
        "candidates": candidates.about
        | {
            f"recall@{top_k}": float(first[f"R@{top_k}"]),
            "oracle_ndcg@10": ceiling,
            "measures": {n: float(first[n]) for n in names},
            "notes": candidates.notes,
        },
        "rows": rows,
        "sweeps": [_point(point, dataset, names, seed) for point in points],
    }
    none = _agreement([], []) if agreed else None  # columns for every row where one has them
    per_query = pd.concat([_per_query(label, frames[label], collected[label]["records"], agreed.get(label, none)) for label in methods], ignore_index=True)
    files: dict[str, str | bytes] = {f"runs/{file_name(label)}.trec": "".join(trec_lines(run, file_name(label))) for label, run in runs.items()}
    beside = {"per_query.csv": per_query.to_csv(index=False).encode(), "scores.parquet": _scores(collected, candidates, dataset.qrels)}
    result["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in beside.items()}
    return result, files | beside | {RESULTS: json.dumps(result, indent=1, allow_nan=False) + "\n"}


def is_remote(label: str) -> bool:
    """Whether a row is a server\'s."""
    return split_label(label)[0] is not None


def _ours(label: str) -> str:
    return split_label(label)[1]


def _run(records: list[dict[str, Any]]) -> Run:
    return {r["query"]: Ranked(r["documents"], np.array(r["scores"], dtype=np.float32)) for r in records}


def _agreement(records: list[dict[str, Any]], ours: list[dict[str, Any]]) -> pd.DataFrame:
    """stats.agreement of the shown scores, one row a query that both ranked."""
    other = {r["query"]: dict(zip(r["documents"], r["relevance"])) for r in ours}
    found = {r["query"]: stats.agreement(dict(zip(r["documents"], r["relevance"])), other[r["query"]]) for r in records if r["query"] in other}
    return pd.DataFrame(list(found.values()), index=pd.Index(list(found), name="query", dtype=object), columns=AGREEMENT, dtype=np.float64)


def _row(
    label: str, method: Method, dataset: Dataset, about: dict[str, Any], frames: dict[str, pd.DataFrame], run: Run, part: dict[str, Any],
    agreed: pd.DataFrame | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    frame, records, config = frames[label], part["records"], about["config"]
    remote = is_remote(label)
    known = [] if remote else records  # what a server's method cost, besides time, it does not tell
    # A server is asked for the names that were given; here they stand for models that are loaded.
    names = config if remote else about["models"]
    primary, baseline = config["measures"][0], config["baseline"]
    seconds = np.array([r["seconds"] for r in records])
    ranked = sum(r["candidates"] for r in records)
    cold = part["cold"]
    vs = None
    if label != baseline:
        a, b = frame[primary].to_numpy(), frames[baseline][primary].to_numpy()
        vs = {"baseline": baseline, "measure": primary} | stats.paired(a, b, seed) | {"p_holm": None}
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "method": label,
        "model": names["model"] if "bi-encoder" in method.roles else None,
        "model_cross": names["model_cross"] if runs_cross(_ours(label), method) else None,
        "queries": len(frame),
        "timed_queries": len(records),
        "measures": {n: float(frame[n].mean()) for n in frame},
        "ci95": {n: stats.bootstrap_interval(frame[n].to_numpy(), seed) for n in frame},
        "vs": vs,
        "agreement": _mean_agreement(_ours(label), agreed),
        "vs_fp32": _change(part["records"], part["exact"], "torch, fp32", dataset, seed) if "exact" in part else None,
        "vs_definition": _vs_definition(part["kernels"], dataset, seed) if "kernels" in part else None,
        "settings": sent_settings(method, config["max_tokens_per_doc"]) if remote else method.settings(),
        "latency_ms": _latency(seconds),
        "cold_latency_ms": _latency(np.array(cold["seconds"])),
        "cold_sample": {"queries": len(cold["seconds"]), "measured": cold["measured"]},
        "phases_ms": _phases([r["phases"] for r in known]),
        "cold_phases_ms": _phases(cold["phases"]),
        "docs_per_s": ranked / float(seconds.sum()) if records else None,
        "cold_docs_per_s": cold["documents"] / sum(cold["seconds"]) if cold["seconds"] else None,
        "peak_rss_mb": max((r["peak_rss_mb"] for r in known), default=None if remote else 0.0),
        "cold_peak_rss_mb": cold["peak_rss_mb"],
        "flops_per_query": float(np.mean([r["flops"] for r in known])) if known else None,
        "cold_flops_per_query": float(np.mean([r["flops"] + r["flops_new"] for r in known])) if known else None,
        "coverage": coverage(run, dataset.qrels),
        "unjudged_share": unjudged_share(run, dataset.qrels),
        "token_limit": part["token_limit"],
        "truncated_share": None if remote else sum(r["truncated"] for r in records) / max(1, ranked),
        "tie_rate": tie_rate(run),
    }


def _mean_agreement(ours: str, agreed: pd.DataFrame | None) -> dict[str, Any] | None:
    """Means over queries, of max_score_diff the largest; None where nothing was compared."""
    if agreed is None or agreed.empty:
        return None
    values = {name: agreed[name].max() if name == "max_score_diff" else agreed[name].mean() for name in AGREEMENT}
    return {"with": ours, "queries": len(agreed)} | {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def _change(own: list[dict[str, Any]], other: list[dict[str, Any]], name: str, dataset: Dataset, seed: int) -> dict[str, Any]:
    """What nDCG@10 and scores differ in between two ways to compute the same rankings."""
    a, b = (evaluate(_run(records), dataset.qrels, ["nDCG@10"])["nDCG@10"].to_numpy() for records in (own, other))
    agreed = _mean_agreement(name, _agreement(own, other)) or {}
    return {"delta_ndcg@10": float((a - b).mean()), "ci95": stats.bootstrap_interval(a - b, seed), **agreed}


def _vs_definition(ways: dict[str, list[dict[str, Any]]], dataset: Dataset, seed: int) -> dict[str, Any]:
    """Type of number → what the kernels change in it against their definition in fp32, on the same vectors."""
    return {name: _change(records, ways[DEFINITION], "definition, fp32", dataset, seed) for name, records in ways.items() if name != DEFINITION}


def _point(point: Point, dataset: Dataset, names: list[str], seed: int) -> dict[str, Any]:
    """One point of a sweep; recall and the oracle's nDCG@10 are of the documents that the method ranked."""
    run = _run(point.records)
    frame = evaluate(run, dataset.qrels, names)
    depth = max((len(r.documents) for r in run.values()), default=1)
    ranked = sum(r["candidates"] for r in point.records)
    return {
        "setting": point.setting, "value": point.value, "method": point.method, "queries": len(frame),
        "measures": {n: float(frame[n].mean()) for n in frame},
        "ci95": {names[0]: stats.bootstrap_interval(frame[names[0]].to_numpy(), seed)},
        "recall": float(evaluate(run, dataset.qrels, [f"R@{depth}"]).iloc[:, 0].mean()),
        "oracle_ndcg@10": float(evaluate(oracle(run, dataset), dataset.qrels, ["nDCG@10"])["nDCG@10"].mean()),
        "latency_ms": _latency(np.array([r["seconds"] for r in point.records])),
        "flops_per_query": float(np.mean([r["flops"] for r in point.records])) if point.records else None,
        "truncated_share": sum(r["truncated"] for r in point.records) / max(1, ranked),
    }  # fmt: skip


def _phases(phases: list[dict[str, float]]) -> dict[str, float] | None:
    """Medians over queries."""
    return {p: 1000 * float(np.median([seconds.get(p, 0.0) for seconds in phases])) for p in PHASES} if phases else None


def _latency(seconds: np.ndarray) -> dict[str, float] | None:
    if not len(seconds):
        return None
    return {"p50": 1000 * float(np.percentile(seconds, 50)), "p95": 1000 * float(np.percentile(seconds, 95))}


def _per_query(label: str, frame: pd.DataFrame, records: list[dict[str, Any]], agreed: pd.DataFrame | None) -> pd.DataFrame:
    cost = pd.DataFrame(
        [
            {"query": r["query"], "candidates": r["candidates"], "latency_ms": 1000 * r["seconds"]}
            | {f"{p}_ms": 1000 * s for p, s in (r["phases"] or {}).items()}
            for r in records
        ],
        columns=["query", "candidates", "latency_ms", *(f"{p}_ms" for p in PHASES)],
    ).set_index("query")
    joined = frame.join(cost) if agreed is None else frame.join(cost).join(agreed)
    joined["candidates"] = joined["candidates"].fillna(0).astype(int)
    joined.insert(0, "method", label)
    return joined.reset_index()


NOTHING_RANKED = pd.DataFrame(
    {name: pd.Series(dtype=kind) for name, kind in {
        "method": str, "query": str, "document": str, "rank": np.int32, "score": np.float32, "relevance": np.float64, "first_stage": np.float32, "grade": "Int32",
    }.items()}
)  # fmt: skip


def _scores(collected: dict[str, dict[str, Any]], candidates: Candidates, qrels: Qrels) -> bytes:
    parts = []
    for label, part in collected.items():
        for r in part["records"]:
            ranked = candidates.run[r["query"]]
            first = dict(zip(ranked.documents, ranked.scores))
            columns = {
                "method": label,
                "query": r["query"],
                "document": r["documents"],
                "rank": np.arange(1, len(r["documents"]) + 1, dtype=np.int32),
                "score": np.array(r["scores"], dtype=np.float32),
                "relevance": np.array(r["relevance"], dtype=np.float64),
                "first_stage": np.array([first[d] for d in r["documents"]], dtype=np.float32),
                "grade": pd.array([qrels[r["query"]].get(d) for d in r["documents"]], dtype="Int32"),  # null: not judged
            }
            parts.append(pd.DataFrame(columns))
    buffer = io.BytesIO()
    (pd.concat(parts, ignore_index=True) if parts else NOTHING_RANKED).to_parquet(buffer, index=False)
    return buffer.getvalue()


def findings(result: dict[str, Any]) -> list[str]:
    """One sentence a method: whether it differs from the baseline (Holm p below .05), by how much, and at what price; then `changes`."""
    rows = {row["method"]: row for row in result["rows"]}
    base = rows[result["config"]["baseline"]]
    sentences = []
    for label, row in rows.items():
        if (vs := row["vs"]) is None:
            continue
        verb = "cannot be told from" if vs["p_holm"] >= ALPHA else "beats" if vs["delta"] > 0 else "is worse than"
        times = ""
        if row["latency_ms"] and base["latency_ms"]:
            what = "over HTTP" if is_remote(label) or is_remote(base["method"]) else "documents seen before"
            times = f", at {row['latency_ms']['p50'] / base['latency_ms']['p50']:.1f} x its median latency ({what})"
        sentences.append(
            f"{label} {verb} {vs['baseline']}: {interval(vs['delta'], vs['ci95'], '+.3f', '+.3f')} {vs['measure']}, Holm p {p_text(vs['p_holm'])}{times}."
        )
    return [*sentences, *changes(result)]


def changes(result: dict[str, Any]) -> list[str]:
    """One sentence a method for what a runtime or precision changes, and one an endpoint: how far it agrees with the same method here."""
    rows, sentences = {row["method"]: row for row in result["rows"]}, []
    for label, row in rows.items():
        if lost := row.get("vs_fp32"):
            change, gap = interval(lost["delta_ndcg@10"], lost["ci95"], "+.4f", "+.4f"), lost.get("max_score_diff")
            scores = "" if gap is None else f", largest score difference {gap:.2g}"
            sentences.append(f"{label} under {result['models']['arithmetic']}: {change} nDCG@10 against torch, fp32 on the same candidates{scores}.")
    for label, row in rows.items():
        if agreed := row.get("agreement"):
            tau, overlap, gap = ("undefined" if agreed[k] is None else f"{agreed[k]:{form}}" for k, form in zip(AGREEMENT, (".4f", ".4f", ".2g")))
            queries = f"{agreed['queries']} {'query' if agreed['queries'] == 1 else 'queries'}"
            sentences.append(f"{label} beside {agreed['with']} here, {queries}: Kendall's tau {tau}, overlap at 10 {overlap}, largest score difference {gap}.")
    return sentences


def table(result: dict[str, Any]) -> str:
    """The results for a terminal of 80 columns."""
    primary = result["config"]["measures"][0]
    cells = [["method", f"{primary} [95% CI]", "delta [95% CI]", "Holm p", "p50 ms", "new docs"]]
    for row in result["rows"]:
        vs = row["vs"]
        delta = interval(vs["delta"], vs["ci95"], "+.3f", "+.3f") if vs else "baseline"
        cost = [_ms(row["latency_ms"]), _ms(row["cold_latency_ms"])]
        cells.append([row["method"], interval(row["measures"][primary], row["ci95"][primary]), delta, p_text(vs["p_holm"]) if vs else "", *cost])
    others = [["method", *result["config"]["measures"][1:], "docs/s", "MB", "MFLOP"]]
    for row in result["rows"]:
        values = [f"{row['measures'][n]:.4f}" for n in result["config"]["measures"][1:]]
        others.append([row["method"], *values, _whole(row["docs_per_s"]), _whole(row["peak_rss_mb"]), _whole(row["flops_per_query"], 1e6)])
    kernels = [["method", "kernels and definition", *DTYPES]]
    for row in result["rows"]:
        if changes := row["vs_definition"]:
            shown = [changes.get(name) for name in DTYPES]
            kernels.append([row["method"], "nDCG@10", *("-" if c is None else f"{c['delta_ndcg@10']:+.4f}" for c in shown)])
            kernels.append(["", "largest difference", *("-" if c is None or c.get("max_score_diff") is None else f"{c['max_score_diff']:.0e}" for c in shown)])
    said = [line for sentence in findings(result) for line in textwrap.wrap(sentence, 80)]
    return "\n".join(
        [*head(result), "", *_columns(cells), "", *_columns(others), "", *(([*_columns(kernels), ""]) if kernels[1:] else []), *said, *([""] if said else [])]
    )


def head(result: dict[str, Any]) -> list[str]:
    """What was ranked, by which first stage, and the ceiling that its candidates set."""
    data, first, primary = result["dataset"], result["candidates"], result["config"]["measures"][0]
    recall = next(k for k in first if k.startswith("recall@"))
    return [
        f"{data['name']} ({data['split']}): {result['rows'][0]['queries']} judged queries, {data['documents']:,} documents",
        f"first stage {first['source']}, top {first['top_k']}: {primary} {first['measures'][primary]:.4f}, {recall} {first[recall]:.4f}",
        f"best order of these candidates (oracle): nDCG@10 {first['oracle_ndcg@10']:.4f}",
    ]


def interval(value: float, ci: list[float] | None, form: str = ".4f", ends: str = ".3f") -> str:
    """A value with its 95% interval as people write it."""
    if ci is None:
        return f"{value:{form}} [one query]"
    low, high = (re.sub(r"^([+-]?)0\.", r"\1.", f"{end:{ends}}") for end in ci)
    return f"{value:{form}} [{low}, {high}]"


def p_text(p: float | None) -> str:
    """A p-value, never 0."""
    return "undefined" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _whole(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def _ms(latency: dict[str, float] | None) -> str:
    return f"{latency['p50']:,.1f}" if latency else "-"


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
