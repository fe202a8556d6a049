"""Measures of ir-measures, computed over every judged query."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import ir_measures
import pandas as pd
from ir_measures.measures.base import MeanAgg

from rerank_lab.datasets.dataset import GRADES, HIGHEST_GRADE, Dataset, Qrels
from rerank_lab.datasets.runs import Run, rank_scores
from rerank_lab.errors import UserError

HIGHEST_UNCUT_NDCG = 1_000  # the highest grade for nDCG without a cut-off: trec_eval takes 20 ms a query at this grade, and time grows with the grade
HIGHEST_EXPONENTIAL = 4  # the highest grade for gains of 2^grade - 1, up to which ERR's probabilities are defined


def parse_measures(names: Sequence[str]) -> list[Any]:
    """Measures of ir-measures by name.

    Raises:
        UserError: some names are unknown; the message lists all of them, and the valid ones.
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
    """The measure of a name, after one computation with it as a test."""
    measure = ir_measures.parse_measure(name)
    # Providers in C crash on cut-offs below 1, and read beyond their arrays if `rel` exceeds every allowed grade. Measures that sum over queries have no mean.
    if any(isinstance(v, int) and v < 1 for v in measure.params.values()) or not isinstance(measure.aggregator(), MeanAgg):
        raise ValueError(name)
    if not 0 < float(measure.params.get("p", 0.5)) < 1:  # the persistence p of Compat and RBP
        raise ValueError(name)
    rel, gains = measure.params.get("rel", 1), (measure.params.get("gains") or {}).values()
    if any(not isinstance(v, int) or abs(v) > most for v, most in ((rel, HIGHEST_GRADE), *((gain, _highest(measure)) for gain in gains))):
        raise ValueError(name)
    list(ir_measures.iter_calc([measure], [ir_measures.Qrel("1", "1", rel)], [ir_measures.ScoredDoc("1", "1", 1.0)]))
    return measure


def known_measures() -> list[str]:
    """Names of ir-measures that can be computed here, bare or with a cut-off."""
    return sorted(name for name in ir_measures.measures.registry if any(map(_computed, (name, f"{name}@10"))))


def _computed(name: str) -> bool:
    try:
        return _measure(name) is not None
    except Exception:  # noqa: BLE001 - as in parse_measures
        return False


def check_grades(names: Sequence[str], dataset: Dataset) -> None:
    """Checks that all measures support all grades of a dataset.

    Raises:
        UserError: a measure does not support a grade; the message names the grade's file and line.
    """
    for query, document, problem in _unsupported(parse_measures(names), dataset.qrels):
        raise UserError(f"{dataset.place(query, document)}: {problem}")


def _highest(measure: Any) -> int:
    """The highest grade that a measure supports in acceptable time and memory."""
    if measure.NAME == "ERR" or measure.params.get("dcg") == "exp-log2":
        return HIGHEST_EXPONENTIAL
    return HIGHEST_UNCUT_NDCG if measure.NAME == "nDCG" and "cutoff" not in measure.params else HIGHEST_GRADE


def _unsupported(measures: Sequence[Any], qrels: Qrels) -> Iterator[tuple[str, str, str]]:
    """(query, document, message) of each judgement whose grade would crash a provider or take too much memory."""
    highest = min(map(_highest, measures), default=HIGHEST_GRADE)
    strict = " and ".join(str(measure) for measure in measures if _highest(measure) == highest)
    said = GRADES if highest == HIGHEST_GRADE else f"the highest that {strict} can have is {highest}"
    for query, judged in qrels.items():
        for document, grade in judged.items():
            if not -HIGHEST_GRADE <= grade <= highest:
                yield query, document, f"grade {grade} of document {document} for query {query}, and {said}; map grades to a smaller scale"


def _relevant(measure: Any) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """The lowest grade that counts as relevant, and (grade, gain) pairs; None for Judged, which counts every judgement."""
    return None if measure.NAME == "Judged" else (measure.params.get("rel", 1), tuple((measure.params.get("gains") or {}).items()))


def _any_relevant(grades: Iterable[int], needed: int, gains: tuple[tuple[int, int], ...]) -> bool:
    gain = dict(gains)
    return any(gain.get(grade, grade) >= needed for grade in grades)


def counted_grades(name: str, qrels: Qrels) -> Qrels:
    """The value of each judgement for a measure. Sorting documents by it (0 without a judgement) gives the best ranking.

    The value is the grade, with two exceptions: for Judged it is 1, and a measure with `gains` maps grades to gains.
    """
    (measure,) = parse_measures([name])
    gains = measure.params.get("gains") or {}
    alike = measure.NAME == "Judged"
    return {q: {d: 1 if alike else int(gains.get(grade, grade)) for d, grade in judged.items()} for q, judged in qrels.items()}


def measure_run(run: Run, qrels: Qrels, names: Sequence[str]) -> pd.DataFrame:
    """Computes measures for every judged query.

    A query that the run lacks scores 0 and stays in the frame. So does a query without any relevant document. Ideal rankings
    come from the complete qrels. Providers get rank-derived scores, so that no tie rule of theirs changes the order.

    Args:
        run: the ranked documents.
        qrels: the judgements.
        names: of the measures.

    Returns:
        one row for each judged query, in the order of qrels; one column for each measure.

    Raises:
        UserError: a measure does not support a grade, or its value is not finite.
    """
    measures = parse_measures(names)
    for _, _, problem in _unsupported(measures, qrels):
        raise UserError(problem)
    values = {str(measure): [0.0] * len(qrels) for measure in measures}
    # Some providers read only numbers as query ids, so queries are numbered.
    place = {q: str(i) for i, q in enumerate(qrels)}
    # trec_eval's arrays end at a query's highest grade. If that is below the lowest relevant grade, it reads and writes beyond them.
    for what in dict.fromkeys(map(_relevant, measures)):
        asked = {q: judged for q, judged in qrels.items() if what is None or _any_relevant(judged.values(), *what)}
        judgements = [ir_measures.Qrel(place[q], d, grade) for q, judged in asked.items() for d, grade in judged.items()]
        scored = [ir_measures.ScoredDoc(place[q], d, s) for q, r in run.items() if q in asked for d, s in zip(r.documents, rank_scores(r))]
        own = [measure for measure in measures if _relevant(measure) == what]
        for metric in ir_measures.iter_calc(own, judgements, scored) if scored else ():
            if not math.isfinite(metric.value):
                raise UserError(f"{metric.measure} of query {list(qrels)[int(metric.query_id)]} is {metric.value}, which is no score; leave the measure out")
            values[str(metric.measure)][int(metric.query_id)] = float(metric.value)
    columns = {name: values[str(measure)] for name, measure in zip(names, measures)}
    return pd.DataFrame(columns, index=pd.Index(list(qrels), name="query"))


def coverage(run: Run, qrels: Qrels) -> float:
    """Share of the judged queries that have at least one ranked document."""
    return sum(q in run and bool(run[q].documents) for q in qrels) / max(1, len(qrels))


def unjudged_share(run: Run, qrels: Qrels, depth: int = 10) -> float:
    """Share of documents without a judgement among the first `depth` of each judged query."""
    seen = [d in qrels[q] for q, r in run.items() if q in qrels for d in r.documents[:depth]]
    return 1 - sum(seen) / len(seen) if seen else 0.0
