"""Results, reports, sweeps and --list name the spread and the tau that it gave; a run goes on under the same spread alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rerank_kernels import MIN_TAU
from rerank_lab.errors import UserError
from rerank_lab.eval import results
from rerank_lab.eval.__main__ import main
from rerank_lab.eval.records import Record
from rerank_lab.eval.rows import Ranker
from rerank_lab.eval.settings import _sweep
from rerank_lab.eval.work import RankingWork
from rerank_lab.methods import make_method, spread
from rerank_lab.methods.best import SPREAD_IN_TAUS, Best
from rerank_lab.methods.spread import measured_text
from rerank_lab.reranker import Reranker
from tests.conftest import report_of
from tests.eval.test_eval import failing, load
from tests.models.checkpoints import bi_encoder, cross_encoder, late_interaction, static


@pytest.fixture
def command(beir: Callable[..., Path], tmp_path: Path) -> list[str]:
    model = ["--model", str(bi_encoder(tmp_path / "model")), "--model-cross", "none", "--no-kernel-check", "--cold-queries", "0", "--top-k", "4"]
    return ["--dataset", str(beir()), *model, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--methods"]


def test_a_word_is_taken_beside_numbers_for_this_setting_alone() -> None:
    assert make_method("best:tau=auto") == Best() == Best(tau="auto") == Best(tau=np.str_("auto")) and type(Best(tau=np.str_("auto")).tau) is str
    assert make_method("best:tau=0.5") == Best(tau=0.5) != Best()
    assert _sweep("tau=auto,0.5,0.05") == ("tau", [0.05, 0.5, "auto"])
    for spec in ("best:tau=warm", "best:tau=AUTO", "best:tau="):
        with pytest.raises(UserError, match="tau takes float values or auto, not"):
            make_method(spec)
    with pytest.raises(UserError, match=r"best: tau must be a finite number from 0 to 1e.09, not 'warm'; beside numbers it takes auto"):
        Best(tau="warm")
    for other in ("best:alpha=auto", "best:stage1_top_k=auto"):
        with pytest.raises(UserError, match=r"takes (float|int) values, not 'auto'"):
            make_method(other)


def test_results_and_report_name_it(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "fast,best,best:tau=0.2,best:tau=auto", "--sweep", "tau=0.1,auto"]) == 0
    found = load(tmp_path / "out")
    spread = json.loads(found["models"]["model_spread"])
    assert [*spread] == ["value", "text", "query_tokens", "document_tokens"] and spread["text"] == measured_text().name
    rows = {row["method"]: row for row in found["rows"]}
    assert {label: row["settings"].get("tau") for label, row in rows.items()} == {"fast": None, "best": "auto", "best:tau=0.2": 0.2, "best:tau=auto": "auto"}
    assert rows["best"]["in_use"] == rows["best:tau=auto"]["in_use"] == {"tau": max(MIN_TAU, spread["value"] / SPREAD_IN_TAUS)} and "in_use" not in rows["fast"]
    read = results.read(tmp_path / "out" / "results.json")
    assert [row.setting("tau") for row in read.rows[1:3]] == [rows["best"]["in_use"]["tau"], 0.2]
    points = {(point["method"], point["value"]): point["measures"] for point in found["sweeps"]}
    assert {value for _, value in points} == {0.1, "auto"} and points["best", "auto"] == points["best:tau=0.2", "auto"] == rows["best"]["measures"]
    report = report_of(tmp_path / "out")
    tau = f"tau=auto ({rows['best']['in_use']['tau']:.4g})"
    assert tau in report and f"{spread['value']:g}, of {spread['query_tokens']:,} query tokens" in report and "| auto |" in report


def test_no_figure_is_measured_that_no_method_needs(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "fast,best:tau=0.2,maxsim"]) == 0
    assert "model_spread" not in load(tmp_path / "out")["models"] and not list((tmp_path / "cache").rglob("spread-*"))
    assert main([*command, "fast,best:tau=0.2", "--sweep", "tau=auto", "--overwrite"]) == 0
    assert "model_spread" in load(tmp_path / "out")["models"], "a sweep's point needs it"


def test_a_run_goes_on_under_the_same_figure_alone(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = RankingWork.records

    def stopped(work: RankingWork, label: str, ranker: Ranker) -> list[Record]:
        if label == "best":
            raise KeyboardInterrupt
        return real(work, label, ranker)

    monkeypatch.setattr(RankingWork, "records", stopped)
    assert main([*command, "fast,best"]) == 130
    monkeypatch.setattr(RankingWork, "records", real)
    (path,) = (tmp_path / "cache").rglob("spread-*.json")
    text = path.read_text()
    value = json.loads(text)
    value["spread"]["value"] *= 0.99
    path.write_text(json.dumps(value))
    assert "the interrupted run differs in in_use, models" in failing(capsys, *command, "fast,best", "--resume")
    path.write_text(text)
    begun = tmp_path / "out" / "partial" / "config.json"
    config = json.loads(begun.read_text())
    assert config["settings"] == {"best": Best(stage1_top_k=config["settings"]["best"]["stage1_top_k"]).settings()}
    older = config["settings"]["best"] | {"length": 0.5}
    for before in (config | {"settings": {"best": older}}, {name: value for name, value in config.items() if name != "settings"}):
        begun.write_text(json.dumps(before))  # as an earlier release, with another default or without the record, left it
        assert "the interrupted run differs in settings;" in failing(capsys, *command, "fast,best", "--resume")
    begun.write_text(json.dumps(config))
    assert main([*command, "fast,best", "--resume"]) == 0
    done = load(tmp_path / "out")
    assert main([*command, "fast,best", "--resume"]) == 0 and "finished already" in capsys.readouterr().out
    done["rows"][1]["settings"]["tau"] = 0.1  # as an earlier release, whose default it was, left it
    del done["rows"][1]["in_use"]
    (tmp_path / "out" / "results.json").write_text(json.dumps(done))
    assert "was finished before the default tau of best changed" in failing(capsys, *command, "fast,best", "--resume")
    done["rows"][1]["settings"]["tau"] = "auto"
    del done["rows"][1]["settings"]["length"]  # as a release without this setting left it
    (tmp_path / "out" / "results.json").write_text(json.dumps(done))
    assert "was finished before the default length of best changed" in failing(capsys, *command, "fast,best", "--resume")


def test_the_comparison_with_fp32_ranks_with_the_tau_of_the_row(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, taus = RankingWork.records, dict[str, object]()

    def watched(work: RankingWork, label: str, ranker: Ranker) -> list[Record]:
        assert isinstance(ranker, Reranker)
        taus[label] = ranker.settings["tau"]
        return real(work, label, ranker)

    monkeypatch.setattr(RankingWork, "records", watched)
    monkeypatch.setattr(spread, "measure", lambda encoder, *texts: {"bf16": 0.25, "fp32": 0.5}[encoder.precision])
    assert main([*command, "best,best:tau=0.2", "--runtime", "torch", "--precision", "bf16"]) == 0
    tau = 0.25 / SPREAD_IN_TAUS
    assert taus == {"best": tau, "best in fp32": tau, "best:tau=0.2": 0.2, "best:tau=0.2 in fp32": 0.2}


@pytest.mark.parametrize("make", [bi_encoder, late_interaction, static], ids=lambda make: make.__name__)
def test_list_tells_what_is_known(make: Callable[[Path], Path], tmp_path: Path, beir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, cache = str(make(tmp_path / "model")), str(tmp_path / "cache")

    def listed(*arguments: str) -> str:
        assert main(["--list", *arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    ask = (folder, "--cache", cache)
    assert f"token spread measured at first use, on 64 train queries of numpydoc and their documents; tau=auto is it / {SPREAD_IN_TAUS:g}" in listed(*ask)
    candidates = ["--candidates", "bm25", "--methods", "best", "--model-cross", "none", "--no-kernel-check", "--cold-queries", "0"]
    assert main(["--dataset", str(beir()), "--model", folder, "--cache", cache, *candidates, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    found = load(tmp_path / "out")
    value = json.loads(found["models"]["model_spread"])["value"]
    said = f"(measured before in fp32, torch, cpu); tau=auto is {found['rows'][0]['in_use']['tau']:.4g}"
    assert f"token spread {value:g}, of" in listed(*ask) and said in listed(*ask)
    assert "measured at first use" in listed(*ask, "--query-prompt", "find: ") and "measured at first use" in listed(folder, "--no-cache")


def test_list_tells_the_shipped_figure_and_of_scorers_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "all-MiniLM-L6-v2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "token spread 0.5, of 676 query tokens and 12,497 document tokens of numpydoc" in said and f"(shipped); tau=auto is {0.5 / SPREAD_IN_TAUS:.4g}" in said
    )
    for name in ("minilm-cross", str(cross_encoder(tmp_path / "cross"))):
        assert main(["--list", name]) == 0 and "token spread" not in capsys.readouterr().out
