"""Which results folders a report accepts, and --compare."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rerank_lab.eval.__main__ import main as evaluation
from rerank_lab.eval.results import RESULTS_SCHEMA as SCHEMA
from rerank_lab.measures import stats
from rerank_lab.report import figures
from rerank_lab.report.__main__ import main
from rerank_lab.report.load import load
from tests.conftest import DOCUMENTS, QUERIES, write_beir
from tests.report.test_report import failing

RELEVANT = {"q1": "d4 d6", "q2": "d5", "q3": "d2 d3", "q4": "d1 d4"}  # arbitrary, so that methods and lengths differ


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations on one small collection. b cuts documents and has another baseline, c has other candidates, d has no method in common with a."""
    root = tmp_path_factory.mktemp("folders")
    folder = write_beir(root / "small", qrels={q: dict.fromkeys(relevant.split(), 1) for q, relevant in RELEVANT.items()})
    (root / "all.trec").write_text("".join(f"{q} Q0 {d} 1 {9 - n} x\n" for q in QUERIES for n, d in enumerate(DOCUMENTS)))
    arguments = ["--dataset", str(folder), "--cold-queries", "0", "--no-cache", "--no-kernel-check", "--candidates", f"run:{root / 'all.trec'}", "--measures"]
    for name, rest in {
        "a": ["nDCG@10,P@1", "--methods", "fast,best"],
        "b": ["P@1,nDCG@10", "--methods", "best,fast,standard", "--max-tokens-per-doc", "2", "--seed", "3"],
        "c": ["nDCG@10", "--methods", "fast,best", "--top-k", "1"],
        "d": ["nDCG@10", "--methods", "optimal"],
        "e": ["P@1", "--methods", "best"],
    }.items():
        assert evaluation([*arguments, *rest, "--out", str(root / name)]) == 0
    shutil.copytree(root / "a", root / "f")  # a query without candidates leaves such results, and the hash is the same
    rows = (root / "f" / "per_query.csv").read_text()
    (root / "f" / "per_query.csv").write_text(re.sub(r"\bq4\b", "q5", rows))
    (without_hashes(root / "f") / "scores.parquet").unlink()
    return root


def without_hashes(folder: Path) -> Path:
    result = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({key: value for key, value in result.items() if key != "files"}))
    return folder


def damaged(made: Path, tmp_path: Path, name: str, change: Callable[[str], str]) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(made / "a", copy)
    (copy / name).write_text(change((copy / name).read_text()))
    return copy


def with_key(key: str, value: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({k: v for k, v in ({**json.loads(text), key: value}).items() if v is not ...}, default=str)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("results.json", lambda text: text[: len(text) // 2], "does not read back"),
        ("results.json", lambda text: "[]", "schema None"),
        ("results.json", with_key("schema", SCHEMA - 1), f"schema {SCHEMA - 1}, and this version reads schema {SCHEMA}; run the evaluation again"),
        ("results.json", with_key("schema", SCHEMA + 1), "a newer rerank_lab made it: upgrade"),
        ("results.json", with_key("schema", str(SCHEMA)), f"schema '{SCHEMA}', and this version"),
        ("results.json", with_key("candidates", ...), "candidates is missing"),
        ("results.json", with_key("sweeps", None), "sweeps is no list"),
        ("results.json", with_key("rows", []), "its rows () are not those"),
        ("results.json", with_key("rows", [1]), "rows[0]. is no object"),
        ("results.json", with_key("rows", [{"method": "fast"}]), "rows[0].queries is missing"),
        ("results.json", lambda text: text.replace('"baseline": "fast"', '"baseline": "slow"'), "are not those of its configuration"),
        ("results.json", lambda text: text.replace('"p_t"', '"p_u"'), "rows[1].vs.p_t is missing"),
        ("results.json", lambda text: text.replace('"cpu"', '"gpu"'), "environment.cpu is missing"),
        ("results.json", lambda text: text.replace('"recall@100"', '"recall"'), "candidates.recall@ is missing"),
        ("results.json", lambda text: re.sub(r'"delta": [^,]+', '"delta": 0.5', text), "does not agree with itself on best"),
        ("results.json", lambda text: re.sub(r'("P@1": )[\d.]+', r'\1"1.0"', text, count=1), 'P@1 is "1.0"'),
        ("results.json", lambda text: re.sub(r'"per_query.csv": "\w+"', '"per_query.csv": "0"', text), "is not the one that results.json came with"),
        ("per_query.csv", lambda text: text + text.splitlines()[-1] + "\n", "holds a query twice"),
        ("per_query.csv", lambda text: re.sub(r"(q1,fast),[\d.]+", r"\1,one", text), "holds no numbers in nDCG@10"),
        ("per_query.csv", lambda text: "".join(text.splitlines(keepends=True)[:-1]), "has 3 of 4 queries of best"),
        ("per_query.csv", lambda text: text.replace("P@1", "P@2"), "lacks the columns P@1"),
        ("per_query.csv", lambda text: re.sub(r"(q1,fast),[\d.]+", r"\1,0.123", text), "are of two runs"),
        ("per_query.csv", lambda text: "", "does not read back"),
    ],
)
def test_damaged_results_are_refused_by_name_and_nothing_is_written(
    made: Path, tmp_path: Path, name: str, change: Callable[[str], str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(made, tmp_path, name, change)
    said = failing(capsys, made / "a", copy, "--out", tmp_path / "out")
    assert message in said and str(copy) in said and not (tmp_path / "out").exists()


def test_missing_and_partial_results_are_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no finished results in results" in failing(capsys)
    assert "no such folder" in failing(capsys, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "has no results.json" in failing(capsys, tmp_path / "empty")
    assert "a file, not a results folder" in failing(capsys, made / "a" / "results.json")
    shutil.copytree(made / "a", tmp_path / "half")
    (tmp_path / "half" / "per_query.csv").unlink()
    assert "per_query.csv is missing" in failing(capsys, tmp_path / "half")
    (tmp_path / "half" / "partial").mkdir()
    (tmp_path / "half" / "partial" / "best.jsonl").write_text('{"query": "q1", "phases": {}}\n{"query": "q2", "phases": {}}\n')
    assert "an interrupted run (best: 2 queries): finish it by the same command with --resume" in failing(capsys, tmp_path / "half")


def test_without_results_the_newest_is_taken(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "d"):
        shutil.copytree(made / name, tmp_path / "results" / name)
    (tmp_path / "results" / "a" / "results.json").touch()
    assert main(["--examples", "0"]) == 0 and "results/a/report.html" in capsys.readouterr().out


def test_queries_without_candidates_are_reported(beir: Callable[..., Path], tmp_path: Path) -> None:
    folder = beir(queries={"q1": " ", "q2": ""}, qrels={"q1": {"d1": 1}, "q2": {"d2": 1}})
    assert evaluation(["--dataset", str(folder), "--methods", "fast,best", "--cold-queries", "0", "--no-cache", "--out", str(tmp_path / "out")]) == 0
    assert main([str(tmp_path / "out")]) == 0


def test_ids_that_look_like_numbers_stay_text(made: Path, tmp_path: Path) -> None:
    ids = dict(zip(QUERIES, ("007", "1e3", "NA", "12")))
    copy = without_hashes(damaged(made, tmp_path, "per_query.csv", lambda text: re.sub(r"\bq[1-4]\b", lambda found: ids[found[0]], text)))
    (copy / "scores.parquet").unlink()
    assert [*load([copy])[0].measure("fast").index] == [*ids.values()]


def test_two_results_of_the_same_candidates_are_compared(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare", str(made / "a"), str(made / "b"), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "comparison.html" in said and "best cannot be told apart: " in " ".join(said.split())
    assert all(len(line) <= 80 for line in said.splitlines() if not line.startswith("Written to"))
    text = (tmp_path / "comparison.md").read_text()
    frames = {name: pd.read_csv(made / name / "per_query.csv").pivot(index="query", columns="method", values="nDCG@10") for name in "ab"}
    corrected = stats.holm([stats.paired_randomization(frames["b"][m].to_numpy(), frames["a"][m].to_numpy(), 0) for m in ("fast", "best")])
    for method, p in zip(("fast", "best"), corrected):
        before, after = frames["a"][method], frames["b"][method]
        assert f"| {method} | {before.mean():.4f} | {after.mean():.4f} | {(after - before).mean():+.4f} [" in text
        row = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
        assert f"| {p:.3f} |".replace(" 0.", " .") in row and f"| {(after > before).sum()}/{(after == before).sum()}/{(after < before).sum()} |" in row
    assert "standard ran in B alone" in text and "| config: max\\_tokens\\_per\\_doc | 512 | 2 |".replace("\\_", "_") in text.replace("\\_", "_")
    assert "| config: seed | 0 | 3 |" in text and "config: baseline" in text and "× A's median latency" in text
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"comparison.png", "comparison-queries.png"} and "<img" in (
        tmp_path / "comparison.html"
    ).read_text()
    assert main(["--compare", str(made / "a"), str(made / "a"), "--out", str(tmp_path / "same")]) == 0
    text = (tmp_path / "same" / "comparison.md").read_text()
    assert "differs, at 1.00 × A's median latency.\n\nA is " in text, "the list ends before the paragraph"
    assert "**best** is the same in both: no query's nDCG@10 differs" in text and "Nothing of configuration, models and environment." in text


def test_scores_of_another_run_and_times_of_another_machine_are_told(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made / "a", copy)
    shutil.copy(made / "d" / "scores.parquet", copy)
    assert "scores.parquet and results.json are of two runs" in failing(capsys, copy)
    result = json.loads((made / "b" / "results.json").read_text())
    result["environment"]["cpu"] = "another"
    shutil.rmtree(copy)
    shutil.copytree(made / "b", copy)
    (copy / "results.json").write_text(json.dumps(result))
    assert main(["--compare", str(made / "a"), str(copy), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "median latency" not in text and "latencies are of different machines" in text and "| environment: cpu |" in text


def test_ceilings_sweeps_and_kernels_speak_of_the_first_measure(made: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(made / "small"), "--methods", "fast,best", "--measures", "P@1,nDCG@10", "--sweep", "top_k=1,3", "--cold-queries", "0"]
    assert evaluation([*arguments, "--no-cache", "--out", str(tmp_path)]) == 0 and main([str(tmp_path), "--examples", "0"]) == 0
    text, (one,) = (tmp_path / "report.md").read_text(), load([tmp_path])
    assert f"best order of these candidates (oracle): P@1 {one.result.candidates.ceiling:.4f}" in text
    assert "| oracle's P@1, at most |" in text and "| Δ P@1 [95% CI] | largest score difference |" in text
    above, _ = figures.swept(one, "top_k").axes
    assert [line.get_label() for line in above.lines] == ["recall of what is ranked, at most", "its best order's P@1"]
    assert [*np.asarray(above.lines[1].get_ydata())] == [max(p.ceiling for p in one.result.sweeps if p.value == value) for value in (1, 3)]


def test_a_new_run_leaves_no_report_of_the_old_one(made: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(made / "small"), "--methods", "fast", "--cold-queries", "0", "--out", str(tmp_path / "out")]
    assert evaluation([*arguments, "--limit-queries", "2"]) == 0 and main([str(tmp_path / "out"), "--examples", "0", "--latex"]) == 0
    (tmp_path / "out" / "mine.md").write_text("kept")
    assert evaluation([*arguments, "--overwrite"]) == 0
    assert {p.suffix for p in (tmp_path / "out").iterdir()} & {".html", ".tex"} == set() and not (tmp_path / "out" / "report.md").exists()
    assert (tmp_path / "out" / "mine.md").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("c", "the hash of their candidates differs"),
        ("d", "no method is in both: "),
        ("e", "has no nDCG@10, which"),
        ("f", "2 judged queries are in one of them alone"),
    ],
)
def test_what_is_no_pair_is_refused(made: Path, tmp_path: Path, other: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failing(capsys, "--compare", made / "a", made / other, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_does_not_go_together(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs --out" in failing(capsys, "--compare", made / "a", made / "b")
    assert "not results, quote" in failing(capsys, made / "a", "--compare", made / "a", made / "b", "--out", tmp_path, "--quote", "none")
    assert "NAME=PATH" in failing(capsys, made / "a", "--dataset", "small")
    assert "NAME one of small" in failing(capsys, made / "a", "--dataset", "smal=x")
    (tmp_path / "file").write_text("")
    assert main([str(made / "a"), "--examples", "0", "--out", str(tmp_path / "file")]) == 1
    assert "failed" in capsys.readouterr().err
