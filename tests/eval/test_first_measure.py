"""Sweeps, ceilings and the kernel check use the first of --measures. The tests compare them with ir_measures itself, over every order of documents."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
import pytest

from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.dataset import Qrels
from rerank_lab.datasets.runs import Ranked
from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.eval.kernel_check import CastReranker
from rerank_lab.first_stage.candidates import oracle
from rerank_lab.measures.quality import counted_grades, known_measures, measure_run, parse_measures
from rerank_lab.reranker import Ranking
from tests.conftest import DOCUMENTS, QUERIES, report_of
from tests.eval.test_eval import load

GRADES: Qrels = {"q1": {"d1": 1, "d2": 2, "d4": 0}, "q2": {"d3": 1, "d6": 2}, "q3": {"d5": 1, "d3": 1, "d1": 0}, "q4": {"d2": 1}}


def measured(name: str, orders: Mapping[str, Sequence[str]]) -> float:
    """The mean over QUERIES, computed by ir_measures alone."""
    qrels = [ir_measures.Qrel(q, d, grade) for q, judged in GRADES.items() for d, grade in judged.items()]
    run = [ir_measures.ScoredDoc(q, d, -place) for q, documents in orders.items() for place, d in enumerate(documents)]
    measure = ir_measures.parse_measure(name)
    return float(sum(metric.value for metric in ir_measures.iter_calc([measure], qrels, run))) / len(QUERIES)


def best(name: str, sets: Mapping[str, Sequence[str]]) -> float:
    """The highest value over all orders of each query's documents."""
    return sum(max(measured(name, {q: order}) for order in itertools.permutations(documents)) for q, documents in sets.items())


def orders(out: Path, method: str) -> dict[str, list[str]]:
    table = pd.read_parquet(out / "scores.parquet")
    return {str(q): list(own.sort_values("rank")["document"]) for q, own in table[table["method"] == method].groupby("query")}


@pytest.mark.parametrize("measures", ["P@1,nDCG@10", "AP@100,nDCG@10", "Judged@2,nDCG@10"])
def test_a_sweep_and_its_ceilings_are_of_it(beir: Callable[..., Path], tmp_path: Path, measures: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, out = measures.partition(",")[0], tmp_path / "out"
    arguments = ["--dataset", str(beir(qrels=GRADES)), "--candidates", "bm25", "--measures", measures, "--cold-queries", "0", "--top-k", "4"]
    assert main([*arguments, "--methods", "fast,best", "--sweep", "stage1_top_k=1,2", "--out", str(out)]) == 0
    result, ranked = load(out), orders(out, "fast")
    key, sets = f"oracle_{name.lower()}", {q: ranked[q] for q in ranked}
    assert result["candidates"][key] == pytest.approx(best(name, sets))
    assert f"(oracle): {name} {result['candidates'][key]:.4f}" in capsys.readouterr().out
    for point in result["sweeps"]:
        one = tmp_path / f"{point['value']}"
        assert main([*arguments, "--methods", f"best:stage1_top_k={point['value']}", "--no-kernel-check", "--out", str(one)]) == 0
        kept = orders(one, f"best:stage1_top_k={point['value']}")
        assert max(map(len, kept.values())) == point["value"] and [*point["ci95"]] == [name]
        assert point[key] == pytest.approx(best(name, kept)) and point["measures"][name] == pytest.approx(measured(name, kept))


def test_the_report_names_it(beir: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["--dataset", str(beir(qrels=GRADES)), "--measures", "P@1,nDCG@10", "--cold-queries", "0", "--sweep", "stage1_top_k=1,2"]
    assert main([*arguments, "--methods", "fast,best", "--out", str(tmp_path / "out")]) == 0
    assert "(oracle): P@1 " in report_of(tmp_path / "out")


def test_the_kernel_check_is_of_it(beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = CastReranker.score

    def backwards(self: CastReranker, query: str, texts: Sequence[str], *, first_stage: Sequence[float] | None = None) -> Ranking:
        """Reverses the kernels' ranking and leaves the definition's as it is."""
        found = real(self, query, texts, first_stage=first_stage)
        return found if self.backend == "reference" else replace(found, order=found.order[::-1])

    monkeypatch.setattr(CastReranker, "score", backwards)
    out = tmp_path / "out"
    assert main(["--dataset", str(beir(qrels=GRADES)), "--measures", "AP@100,P@1", "--cold-queries", "0", "--methods", "fast", "--out", str(out)]) == 0
    ranked = orders(out, "fast")
    lost = measured("AP@100", {q: documents[::-1] for q, documents in ranked.items()}) - measured("AP@100", ranked)
    changes = load(out)["rows"][0]["vs_definition"]
    assert lost < -0.1 and [change["delta_ap@100"] for change in changes.values()] == pytest.approx([lost] * len(changes))
    assert re.search(rf"^fast +AP@100 +{lost:+.4f} ", capsys.readouterr().out, re.MULTILINE)


def test_no_order_is_better_than_the_oracles(beir: Callable[..., Path]) -> None:
    """Every measure that can be computed here, on random judgements; some are missing and some are negative."""
    data, drawn = load_dataset(str(beir())), random.Random(0)
    names = [form for name in known_measures() for form in (name, f"{name}@3") if computable(form)]
    names += ["nDCG(gains={0:1,1:0,2:5})@3", "nDCG(dcg='exp-log2')@3", "P(rel=2)@2", "P(judged_only=True)@2", "Compat(p=0.8)"]
    documents = [*DOCUMENTS][:5]
    for _ in range(8):
        judged = {d: grade for d in DOCUMENTS if (grade := drawn.choice([None, None, 0, 0, 1, 1, 2, 3, -1])) is not None}
        some = replace(data, qrels={"q1": judged or {"d1": 1}})
        runs = [Ranked(drawn.sample(documents, 5), np.arange(5, 0, -1, dtype=np.float32)) for _ in range(8)]
        for name in names:
            top = oracle({"q1": runs[0]}, replace(some, qrels=counted_grades(name, some.qrels)))
            values = [measure_run(run, some.qrels, [name])[name].item() for run in (top, *({"q1": run} for run in runs))]
            assert values[0] >= max(values) - 1e-6, (name, judged)


def computable(name: str) -> bool:
    try:
        return bool(parse_measures([name]))
    except UserError:
        return False
