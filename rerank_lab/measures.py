"""Measures by ir-measures, over every judged query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ir_measures
import pandas as pd

from rerank_lab.datasets import Qrels
from rerank_lab.errors import UserError
from rerank_lab.run import Run, rank_scores

DEFAULT = ("nDCG@10", "RR@10", "AP@100", "R@100", "P@1", "Judged@10")


def parse_measures(names: Sequence[str]) -> list[Any]:
    """ir-measures objects by name.

    Raises:
        UserError: all names that are not known, at once, with the valid ones.
    """
    measures, unknown = [], []
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
            list(ir_measures.iter_calc([measure], [ir_measures.Qrel("q", "d", 1)], [ir_measures.ScoredDoc("q", "d", 1.0)]))
            measures.append(measure)
        except Exception:  # noqa: BLE001 - parsing and each provider raise their own kinds; any of them means that it cannot be used
            unknown.append(name)
    if unknown:
        valid = sorted(name for name, measure in ir_measures.measures.registry.items() if ir_measures.DefaultPipeline.supports(measure))
        raise UserError(f"measures not known or not computable here: {', '.join(unknown)}; valid: {', '.join(valid)}, most with a cut-off as in nDCG@10")
    return measures


def evaluate(run: Run, qrels: Qrels, names: Sequence[str]) -> pd.DataFrame:
    """One row a judged query, in the order of qrels, one column a measure.

    A query that the run lacks scores 0 and stays in the frame, ideal rankings come from the complete qrels, and the
    run's order is handed over as rank-derived scores, so that nothing is sorted again by anyone's tie rule.
    """
    measures = parse_measures(names)
    judgements = [ir_measures.Qrel(q, d, grade) for q, judged in qrels.items() for d, grade in judged.items()]
    scored = [ir_measures.ScoredDoc(q, d, s) for q, r in run.items() if q in qrels for d, s in zip(r.documents, rank_scores(r))]
    values: dict[str, dict[str, float]] = {str(measure): dict.fromkeys(qrels, 0.0) for measure in measures}
    if scored:
        for metric in ir_measures.iter_calc(measures, judgements, scored):
            values[str(metric.measure)][metric.query_id] = float(metric.value)
    columns = {name: list(values[str(measure)].values()) for name, measure in zip(names, measures)}
    return pd.DataFrame(columns, index=pd.Index(list(qrels), name="query"))


def coverage(run: Run, qrels: Qrels) -> float:
    """Share of judged queries that have at least one ranked document."""
    return sum(q in run and bool(run[q].documents) for q in qrels) / max(1, len(qrels))


def unjudged_share(run: Run, qrels: Qrels, depth: int = 10) -> float:
    """Share of the first `depth` ranked documents without any judgement."""
    seen = [d in qrels[q] for q, r in run.items() if q in qrels for d in r.documents[:depth]]
    return 1 - sum(seen) / len(seen) if seen else 0.0
