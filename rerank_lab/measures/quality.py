"""Measures by ir-measures, over every judged query."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import ir_measures
import pandas as pd
from ir_measures.measures.base import MeanAgg

from rerank_lab.datasets.dataset import GRADES, HIGHEST, Dataset, Qrels
from rerank_lab.datasets.runs import Run, rank_scores
from rerank_lab.errors import UserError

SLOW = 1_000  # the same of nDCG without a cut-off, which takes trec_eval 20 ms a query at this grade, and twice the time at twice the grade
STEEP = 4  # the highest grade of gains of 2^grade - 1, for which ERR's probabilities are defined


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
    # Providers in C crash on cut-offs below 1, and read beyond their arrays at a `rel` that no grade may have; a sum over queries is no mean.
    if any(isinstance(v, int) and v < 1 for v in measure.params.values()) or not isinstance(measure.aggregator(), MeanAgg):
        raise ValueError(name)
    if not 0 < float(measure.params.get("p", 0.5)) < 1:  # of Compat and RBP: the share of readers that goes on
        raise ValueError(name)
    rel, gains = measure.params.get("rel", 1), (measure.params.get("gains") or {}).values()
    if any(not isinstance(v, int) or abs(v) > most for v, most in ((rel, HIGHEST), *((gain, _highest(measure)) for gain in gains))):
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
    """Whether all measures bear all grades.

    Raises:
        UserError: a grade that one of them does not, with its file and line.
    """
    for query, document, problem in _unbearable(parse_measures(names), dataset.qrels):
        raise UserError(f"{dataset.place(query, document)}: {problem}")


def _highest(measure: Any) -> int:
    """The highest grade that a measure bears: in bounds, in time and in memory."""
    if measure.NAME == "ERR" or measure.params.get("dcg") == "exp-log2":
        return STEEP
    return SLOW if measure.NAME == "nDCG" and "cutoff" not in measure.params else HIGHEST


def _unbearable(measures: Sequence[Any], qrels: Qrels) -> Iterator[tuple[str, str, str]]:
    """(query, document, what is wrong) of judgements that end a provider, or take all memory."""
    highest = min(map(_highest, measures), default=HIGHEST)
    strict = " and ".join(str(measure) for measure in measures if _highest(measure) == highest)
    said = GRADES if highest == HIGHEST else f"the highest that {strict} can have is {highest}"
    for query, judged in qrels.items():
        for document, grade in judged.items():
            if not -HIGHEST <= grade <= highest:
                yield query, document, f"grade {grade} of document {document} for query {query}, and {said}; map grades to a smaller scale"


def _relevant(measure: Any) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """The grade from which documents count, and what gains stand for grades; None for Judged, to which all judgements count."""
    return None if measure.NAME == "Judged" else (measure.params.get("rel", 1), tuple((measure.params.get("gains") or {}).items()))


def _any_relevant(grades: Iterable[int], needed: int, gains: tuple[tuple[int, int], ...]) -> bool:
    gain = dict(gains)
    return any(gain.get(grade, grade) >= needed for grade in grades)


def counted(name: str, qrels: Qrels) -> Qrels:
    """What each judgement counts for a measure; in the order of it, documents without a judgement as 0, no ranking of the same documents is better.

    These are the grades themselves, but for two kinds of measure: Judged counts every judgement alike, and `gains` put others in their place.
    """
    (measure,) = parse_measures([name])
    gains = measure.params.get("gains") or {}
    alike = measure.NAME == "Judged"
    return {q: {d: 1 if alike else int(gains.get(grade, grade)) for d, grade in judged.items()} for q, judged in qrels.items()}


def evaluate(run: Run, qrels: Qrels, names: Sequence[str]) -> pd.DataFrame:
    """One row a judged query, in the order of qrels, one column a measure.

    A query that the run lacks scores 0 and stays in the frame, ideal rankings come from the complete qrels, and the
    run's order is handed over as rank-derived scores, so that nothing is sorted again by anyone's tie rule.
    A query without a document that a measure counts as relevant scores 0, whoever computes the measure.

    Raises:
        UserError: a grade that a measure does not bear, or a value that is no number.
    """
    measures = parse_measures(names)
    for _, _, problem in _unbearable(measures, qrels):
        raise UserError(problem)
    values = {str(measure): [0.0] * len(qrels) for measure in measures}
    # Some providers read numbers alone as query ids, so queries go by their place.
    place = {q: str(i) for i, q in enumerate(qrels)}
    # trec_eval's arrays end at a query's highest grade; where that is below what counts as relevant, it reads and writes beyond them.
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
    """Share of judged queries that have at least one ranked document."""
    return sum(q in run and bool(run[q].documents) for q in qrels) / max(1, len(qrels))


def unjudged_share(run: Run, qrels: Qrels, depth: int = 10) -> float:
    """Share of the first `depth` ranked documents without any judgement."""
    seen = [d in qrels[q] for q, r in run.items() if q in qrels for d in r.documents[:depth]]
    return 1 - sum(seen) / len(seen) if seen else 0.0
