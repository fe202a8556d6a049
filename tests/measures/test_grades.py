"""Every grade that a qrels file may hold, with every measure: the value by definition, or a refusal with file and line; never a crash."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.dataset import HIGHEST_GRADE
from rerank_lab.datasets.runs import Ranked
from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.measures.quality import known_measures, measure_run, parse_measures
from tests.conftest import QRELS

Judged = dict[str, int]
RANKED = ["d5", "d1", "d0", "d2", "x", "d4"]
NAMES = ["AP", "Bpref", "Compat", "ERR", "Judged", "P", "R", "RR", "Rprec", "SetAP", "SetF", "SetP", "SetR", "SetRelP", "Success", "infAP", "nDCG"]
ALIASES = ["BPref", "MAP", "MRR", "NDCG", "Precision", "RPrec", "Recall"]
CUT = ("P", "R", "RR", "AP", "Success", "nDCG", "Judged", "ERR")


def dcg(gains: list[float]) -> float:
    return sum(max(gain, 0) / math.log2(i + 2) for i, gain in enumerate(gains))


def defined(name: str, judged: Judged, rel: int, k: int) -> float:
    """A measure by trec_eval's definition: relevant from grade `rel` on. A negative grade means pooled but not judged, and gives no gain."""
    grades = [judged.get(d, -1) for d in RANKED]
    hits, total = [grade >= rel for grade in grades], sum(grade >= rel for grade in judged.values())
    if name == "Judged":
        return float(np.mean([d in judged for d in RANKED[:k]]))
    if name in ("nDCG", "exp"):
        gain: Callable[[int], float] = float if name == "nDCG" else lambda grade: 2.0 ** max(grade, 0) - 1
        ideal = dcg(sorted(map(gain, judged.values()), reverse=True)[:k])
        return dcg([gain(g) for g in grades[:k]]) / ideal if ideal else 0.0
    if name == "ERR":
        value, left = 0.0, 1.0
        for i, grade in enumerate(grades[:k]):
            stop = (2 ** max(grade, 0) - 1) / 16
            value, left = value + left * stop / (i + 1), left * (1 - stop)
        return value
    if not total:
        return 0.0
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    p, r = sum(hits) / len(hits), sum(hits) / total
    found, passed = 0.0, 0
    nonrelevant = sum(0 <= grade < rel for grade in judged.values())
    inferred, before = 0.0, 0
    for i, (document, grade) in enumerate(zip(RANKED, grades)):
        if document not in judged or grade < 0:
            continue
        if grade < rel:
            passed += 1
            continue
        found += 1 - min(passed, total) / min(nonrelevant, total) if passed else 1
        pooled = sum(d in judged for d in RANKED[:i])
        inferred += 1 / (i + 1) + (pooled / (i + 1) * (before + 1e-5) / (before + passed + 2e-5) if i else 0)
        before += 1
    values = {
        "P": sum(hits[:k]) / k, "R": sum(hits[:k]) / total, "RR": next((1 / (i + 1) for i, hit in enumerate(hits[:k]) if hit), 0.0),
        "AP": sum(x for x, hit in zip(precision[:k], hits) if hit) / total, "Rprec": sum(hits[:total]) / total, "Success": float(any(hits[:k])),
        "SetP": p, "SetR": r, "SetF": 2 * p * r / (p + r) if p + r else 0.0, "SetAP": p * r, "SetRelP": sum(hits) / min(len(hits), total),
        "Bpref": found / total, "infAP": inferred / total,
    }  # fmt: skip
    return float(values[name])


def drawn(count: int, grades: list[int], seed: int = 0) -> list[Judged]:
    """Judgements of many queries, each with a few grades of its own, so that all kinds of sets occur: only negative, only 0, mixed."""
    draw = random.Random(seed)
    sets = [{f"d{i}": g for i in range(n)} for g in grades for n in (1, 3)]
    for _ in range(count):
        own = draw.sample(grades, draw.randint(1, 3))
        sets.append({f"d{i}": draw.choice(own) for i in range(draw.randint(1, 9))})
    return sets


def in_a_process(names: list[str], sets: list[Judged]) -> dict[str, list[float]]:
    """Values of `measure_run`, column by column. Each set of judgements is also measured alone, with nothing of another query in memory yet."""
    code = (
        "import json, sys, numpy as np\nfrom rerank_lab.measures.quality import measure_run\nfrom rerank_lab.datasets.runs import Ranked\n"
        "names, sets, ranked = json.load(sys.stdin)\n"
        "run = {str(i): Ranked(ranked, -np.arange(len(ranked), dtype=np.float32)) for i in range(len(sets))}\n"
        "whole = measure_run(run, {str(i): judged for i, judged in enumerate(sets)}, names)\n"
        "for i, judged in enumerate(sets[:30]):\n"
        "    assert measure_run({'0': run['0']}, {'0': judged}, names).iloc[0].tolist() == whole.iloc[i].tolist(), judged\n"
        "print(json.dumps({name: whole[name].tolist() for name in names}))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps([names, sets, RANKED]), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", (done.returncode, done.stderr)
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("grades", "steep"),
    [([-HIGHEST_GRADE, -2, -1, 0, 1, 2, 3, 4], True), ([-2, -1, 0, 1, 2, 5, 16, 1000, HIGHEST_GRADE], False)],
    ids=["up to 4", "up to the highest"],
)
def test_every_measure_bears_every_set_of_grades_and_is_what_its_definition_says(grades: list[int], steep: bool) -> None:
    sets, asked = drawn(150, grades), list[tuple[str, str, int, int]]()
    for name in NAMES:
        for k in (3, 100) if name in CUT else (100,):
            for rel in (1, 2) if name not in ("nDCG", "ERR", "Judged", "Compat") else (1,):
                called = name if rel == 1 else f"{name}(relative=True,rel={rel})".replace("SetRelP", "SetP") if name == "SetRelP" else f"{name}(rel={rel})"
                asked.append((name, f"{called}@{k}" if name in CUT else called, rel, k))
    asked += [("exp", f"nDCG(dcg='exp-log2')@{k}", 1, k) for k in (3, 100)]
    asked = [row for row in asked if steep or row[0] not in ("ERR", "exp")]
    values = in_a_process([label for _, label, _, _ in asked], sets)
    for name, label, rel, k in asked:
        if name == "Compat":
            assert all(0 <= value <= 1 for value in values[label])
        else:
            assert values[label] == pytest.approx([defined(name, judged, rel, k) for judged in sets], abs=1e-5), label


def test_all_measures_that_are_listed_are_tried_above_and_can_be_computed() -> None:
    assert sorted(NAMES + ALIASES) == known_measures()
    for name in known_measures():
        try:
            parse_measures([name])
        except UserError:
            parse_measures([f"{name}@10"])


def test_negative_grades_are_no_gain_and_stay_judged() -> None:
    run = {"q": Ranked(["a", "b", "c"], np.array([3, 2, 1], dtype=np.float32))}
    frame = measure_run(run, {"q": {"a": -2, "b": 2, "c": -1}}, ["nDCG@10", "P@1", "Judged@10"])
    assert frame.iloc[0].tolist() == pytest.approx([1 / np.log2(3), 0, 1])


@pytest.mark.parametrize("measures", ["nDCG@10,RR@10,AP@100,R@100,P@1,Judged@10", "RR@10"])
def test_a_query_whose_judgements_are_all_junk_counts_and_scores_0(beir: Callable[..., Path], tmp_path: Path, measures: str) -> None:
    folder = beir(qrels={"q4": {"d2": -2, "d4": -2}} | {q: QRELS[q] for q in ("q1", "q2", "q3")})
    out = tmp_path / "out"
    assert main(["--dataset", str(folder), "--methods", "fast", "--cold-queries", "0", "--measures", measures, "--out", str(out)]) == 0
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert result["rows"][0]["queries"] == 4
    assert pd.read_csv(out / "per_query.csv").set_index("query").loc["q4", measures.split(",")[0]] == 0


@pytest.mark.parametrize("grade", ["100001", "999999999", "9999999999", "-100001", "1e6"])
def test_a_grade_that_no_provider_bears_is_refused_with_file_and_line(beir: Callable[..., Path], grade: str) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text(f"q1\td1\t100000\nq2\td3\t-100000\nq3\td5\t{grade}\n")
    with pytest.raises(UserError, match=rf"test\.tsv:3: the score '{grade}' is too large; grades are whole numbers from -100000 to 100000"):
        load_dataset(str(folder))


def test_what_takes_minutes_is_refused_before_it_begins(beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """trec_eval's nDCG without a cut-off scans all grades up to a query's highest, for each document."""
    folder = beir(qrels={"q1": {"d1": 1_001}})
    assert main(["--dataset", str(folder), "--methods", "fast", "--measures", "nDCG", "--out", str(tmp_path / "out")]) == 2
    assert "test.tsv:2: grade 1001 of document d1 for query q1, and the highest that nDCG can have is 1000" in capsys.readouterr().err
    assert measure_run({"q1": Ranked(["d1"], np.ones(1, dtype=np.float32))}, {"q1": {"d1": 1_000}}, ["nDCG"])["nDCG"].tolist() == [1.0]


@pytest.mark.parametrize("measure", ["ERR@10", "nDCG(dcg='exp-log2')@10"])
def test_a_grade_that_one_measure_does_not_bear_is_refused_before_the_work(
    beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], measure: str
) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t4\nq2\td3\t5\nq3\td5\t9\n")
    arguments = ["--dataset", str(folder), "--model", "no/such-model", "--model-cross", "none", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--measures", f"nDCG@10,{measure}"]) == 2
    said = capsys.readouterr().err
    assert f"{folder}/qrels/test.tsv:3: grade 5 of document d3 for query q2, and the highest that {measure} can have is 4" in said
    assert main([*arguments, "--measures", f"nDCG@10,{measure}", "--limit-queries", "1"]) == 2, "the model is what is wrong now"
    assert "test.tsv" not in capsys.readouterr().err
    with pytest.raises(UserError, match="grade 5 of document d"):
        measure_run({}, {"q": {"d": 5}}, [measure])


@pytest.mark.parametrize(
    "name", ["Bpref(rel=100001)", "Bpref(rel=999999999)", "P(rel=0)@5", "nDCG(gains={1:999999999})@5", "nDCG(gains={2:0.5})@5", "Accuracy"]
)
def test_a_parameter_that_crashes_a_provider_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="not known or not computable here"):
        parse_measures([name])


def test_gains_stand_for_grades() -> None:
    run = {q: Ranked(["a", "b"], np.array([2, 1], dtype=np.float32)) for q in ("p", "q")}
    frame = measure_run(run, {"p": {"a": 1, "b": 9}, "q": {"a": 0, "b": 0}}, ["nDCG(gains={1:3,9:0})@5", "nDCG@5", "P(rel=9)@1"])
    assert frame.loc["p"].tolist() == pytest.approx([1.0, (1 + 9 / np.log2(3)) / (9 + 1 / np.log2(3)), 0.0]) and not frame.loc["q"].any()
