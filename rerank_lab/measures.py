"""Measures by ir-measures, over every judged query."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import ir_measures
import pandas as pd
from ir_measures.measures.base import MeanAgg

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
            measures.append(_measure(name))
        except Exception:  # noqa: BLE001 - parsing and each provider raise their own kinds; any of them means that it cannot be used
            unknown.append(name)
    if unknown:
        raise UserError(f"measures not known or not computable here: {', '.join(unknown)}; valid: {', '.join(known_measures())}, most with @k")
    return measures


@cache
def _measure(name: str) -> Any:
    """The measure, tried once on one judgement."""
    measure = ir_measures.parse_measure(name)
    # Providers in C crash on cut-offs below 1, and a sum over queries is no mean.
    if any(isinstance(v, int) and v < 1 for v in measure.params.values()) or not isinstance(measure.aggregator(), MeanAgg):
        raise ValueError(name)
    list(ir_measures.iter_calc([measure], [ir_measures.Qrel("1", "1", 1)], [ir_measures.ScoredDoc("1", "1", 1.0)]))
    return measure


def known_measures() -> list[str]:
    """Names of ir-measures that some installed provider computes, bare or with a cut-off."""
    return sorted(
        name
        for name, measure in ir_measures.measures.registry.items()
        if any(_supported(m) for m in (measure, measure @ 10)) and isinstance(measure.aggregator(), MeanAgg)
    )


def _supported(measure: Any) -> bool:
    try:
        return bool(ir_measures.DefaultPipeline.supports(measure))
    except AssertionError:  # how ir-measures says that a required parameter is missing, or one is not taken
        return False


def evaluate(run: Run, qrels: Qrels, names: Sequence[str]) -> pd.DataFrame:
    """One row a judged query, in the order of qrels, one column a measure.

    A query that the run lacks scores 0 and stays in the frame, ideal rankings come from the complete qrels, and the
    run's order is handed over as rank-derived scores, so that nothing is sorted again by anyone's tie rule.
    """
    measures = parse_measures(names)
    # Some providers read numbers alone as query ids, so queries go by their place.
    place = {q: str(i) for i, q in enumerate(qrels)}
    judgements = [ir_measures.Qrel(place[q], d, grade) for q, judged in qrels.items() for d, grade in judged.items()]
    scored = [ir_measures.ScoredDoc(place[q], d, s) for q, r in run.items() if q in qrels for d, s in zip(r.documents, rank_scores(r))]
    values = {str(measure): [0.0] * len(qrels) for measure in measures}
    if scored:
        for metric in ir_measures.iter_calc(measures, judgements, scored):
            values[str(metric.measure)][int(metric.query_id)] = float(metric.value)
    columns = {name: values[str(measure)] for name, measure in zip(names, measures)}
    return pd.DataFrame(columns, index=pd.Index(list(qrels), name="query"))


def coverage(run: Run, qrels: Qrels) -> float:
    """Share of judged queries that have at least one ranked document."""
    return sum(q in run and bool(run[q].documents) for q in qrels) / max(1, len(qrels))


def unjudged_share(run: Run, qrels: Qrels, depth: int = 10) -> float:
    """Share of the first `depth` ranked documents without any judgement."""
    seen = [d in qrels[q] for q, r in run.items() if q in qrels for d in r.documents[:depth]]
    return 1 - sum(seen) / len(seen) if seen else 0.0
