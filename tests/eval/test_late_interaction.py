"""An evaluation of a late-interaction model: what runs, what is left out, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rerank_lab.eval.__main__ import main
from rerank_lab.models.kinds import load_bi_encoder
from rerank_lab.report.__main__ import main as report
from tests.conftest import DOCUMENTS, QUERIES
from tests.eval.test_eval import failing
from tests.models.checkpoints import late_interaction


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return late_interaction(tmp_path_factory.mktemp("late") / "colbert")


def test_a_whole_evaluation_and_its_report(colbert: Path, beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "all.trec"
    run.write_text("".join(f"{q} Q0 {d} {n} {-n} all\n" for q in QUERIES for n, d in enumerate(DOCUMENTS, 1)))
    arguments = ["--dataset", str(beir()), "--model", str(colbert), "--candidates", f"run:{run}", "--cold-queries", "1"]
    assert main([*arguments, "--sweep", "stage1_top_k=2", "--out", str(tmp_path / "out")]) == 0
    assert f"fast left out: method fast compares vectors of whole texts, and model '{colbert}' has none (late interaction)" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert [*rows] == ["standard", "optimal", "best", "best+cross", "maxsim"]
    assert json.loads(found["models"]["model_reading"])["late_interaction"] == "PyLate"
    for name in ("best", "maxsim"):
        assert rows[name]["vs_definition"]["fp32"]["max_score_diff"] < 1e-3 and rows[name]["cold_latency_ms"] is not None
    assert report([str(tmp_path / "out"), "--examples", "2", "--quote", "small"]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "maxsim" in text and "[Q]" in text.upper(), "examples show what the query's tokens found"
    capsys.readouterr()
    assert main([*arguments, "--model-cross", "none", "--no-kernel-check", "--out", str(tmp_path / "alone")]) == 0
    said = capsys.readouterr().err
    assert "standard, optimal left out: they need a cross-encoder" in said and "fast left out: method fast compares" in said
    assert [row["method"] for row in json.loads((tmp_path / "alone" / "results.json").read_text())["rows"]] == ["best", "maxsim"]


def test_what_cannot_run_is_refused_at_once(colbert: Path, beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(load_bi_encoder.__module__ + ".late_interaction.load", None)
    arguments = ["--dataset", str(beir()), "--model", str(colbert), "--out", str(tmp_path / "out")]
    said = failing(capsys, *arguments)
    assert "--candidates dense searches by vectors of whole texts" in said and "give another first stage: bm25, splade:MODEL, run:FILE" in said
    said = failing(capsys, *arguments, "--candidates", "bm25", "--methods", "fast,best,best:gamma=1", "--sweep", "gamma=0,2")
    assert "method 'fast': method fast compares vectors of whole texts" in said and "method 'best:gamma=1': best: gamma weighs" in said
    assert "--sweep gamma=2.0: best: gamma weighs feedback from vectors of whole texts" in said
    assert not (tmp_path / "out").exists() and len(QUERIES) == 4
