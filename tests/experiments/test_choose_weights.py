"""The sweep over stored scores gives the same as ranking under the same weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rerank_lab.eval.__main__ import main
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "training"))
import choose_weights as script


def test_the_sweep_equals_an_evaluation_under_the_same_weights(beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "KEEP", 3)
    methods = [
        "fast",
        "standard",
        "best:length=0",
        "optimal:stage1_top_k=3:cosine_weight=0.5",
        "optimal:stage1_top_k=3:cosine_weight=1",
        "best+cross:length=0:cross_weight=0.5",
    ]
    qrels = {"q1": {"d5": 3, "d2": 1}, "q2": {"d4": 2, "d1": 1}, "q3": {"d6": 1, "d1": 2}, "q4": {"d3": 1}}  # far from right, so that orders differ
    out = tmp_path / "out"
    arguments = ["--dataset", str(beir(qrels=qrels)), "--methods", ",".join(methods), "--cold-queries", "0", "--out", str(out)]
    assert main(arguments) == 0
    rows = {row["method"]: row["measures"]["nDCG@10"] for row in json.loads((out / "results.json").read_text())["rows"]}
    found = script.sweep(out)
    labels = ["fast", "standard", "best+cross 0", "optimal 0.5", "optimal 1", "best+cross 0.5"]
    assert [found[label] for label in labels] == pytest.approx([rows[method] for method in methods], abs=1e-9)
    assert len({round(found[label], 6) for label in labels}) >= 3, "settings that differ"


def test_results_that_do_not_serve_are_refused(
    beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dataset", str(beir()), "--methods", "fast", "--cold-queries", "0", "--out", str(tmp_path / "out")]) == 0
    for folder, message in ((tmp_path / "out", "best:length=0, standard missing"), (tmp_path / "none", "no results of rerank_lab.eval")):
        monkeypatch.setattr(sys, "argv", ["choose_weights", str(folder)])
        assert script.main() == 2
        assert message in capsys.readouterr().err
