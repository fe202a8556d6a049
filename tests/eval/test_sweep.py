"""--sweep: methods under several values of one setting."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rerank_lab.eval.__main__ import main
from rerank_lab.eval.records import Record
from rerank_lab.eval.rows import Ranker
from rerank_lab.eval.settings import _sweep
from rerank_lab.eval.work import RankingWork
from tests.eval.test_eval import failing, load


@pytest.fixture
def command(beir: Callable[..., Path], tmp_path: Path) -> list[str]:
    return ["--dataset", str(beir()), "--cold-queries", "0", "--top-k", "3", "--out", str(tmp_path / "out"), "--methods"]


def points(out: Path, setting: str) -> dict[tuple[str, float | str], dict[str, Any]]:
    return {(p["method"], p["value"]): p for p in load(out)["sweeps"] if p["setting"] == setting}


def test_each_value_is_what_a_run_under_it_gives(command: list[str], tmp_path: Path) -> None:
    sweeps = ["--sweep", "stage1_top_k=1,2,5", "--sweep", "max_tokens_per_doc=2,512", "--sweep", "top_k=2,6", "--sweep", "tau=0,auto"]
    assert main([*command, "fast,optimal,best", *sweeps]) == 0
    out = tmp_path / "out"
    main_rows = {r["method"]: r for r in load(out)["rows"]}
    depth = points(out, "stage1_top_k")
    assert {label for label, _ in depth} == {"optimal", "best"}, "fast has no first stage of its own"
    assert [depth["best", k]["recall"] for k in (1, 2, 5)] == sorted(depth["best", k]["recall"] for k in (1, 2, 5))
    for p in load(out)["sweeps"]:
        assert p["measures"]["nDCG@10"] <= p["oracle_ndcg@10"] + 1e-9 and p["queries"] == 4 and p["latency_ms"]["p50"] > 0
    assert depth["best", 1]["recall"] < depth["best", 5]["recall"] and depth["best", 5]["oracle_ndcg@10"] > depth["best", 1]["oracle_ndcg@10"]
    assert points(out, "tau")["best", "auto"]["measures"] == main_rows["best"]["measures"], "the value that it has already"

    arguments = ["--overwrite", "--no-kernel-check"]
    for extra, setting, value in [
        (["--methods", "best:stage1_top_k=2"], "stage1_top_k", 2),
        (["--methods", "best:stage1_top_k=5", "--top-k", "5"], "stage1_top_k", 5),
        (["--methods", "best", "--max-tokens-per-doc", "2", "--candidates", f"run:{tmp_path / 'first.trec'}"], "max_tokens_per_doc", 2),
        (["--methods", "best", "--top-k", "6"], "top_k", 6),
        (["--methods", "best:tau=0"], "tau", 0),
    ]:
        if setting == "max_tokens_per_doc":  # the candidates stay those of whole documents
            assert main([*command[:-1], "--methods", "fast", "--out", str(tmp_path / "first")]) == 0
            (tmp_path / "first.trec").write_text((tmp_path / "first" / "runs" / "fast.trec").read_text())
        assert main([*command[:-1], *extra, *arguments, "--out", str(tmp_path / "one")]) == 0
        assert points(out, setting)["best", value]["measures"] == load(tmp_path / "one")["rows"][0]["measures"], (setting, value)


def test_rows_and_candidates_are_the_same_without_it(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "fast,best"]) == 0
    plain = load(tmp_path / "out")
    assert main([*command, "fast,best", "--sweep", "stage1_top_k=2,6", "--overwrite"]) == 0
    swept = load(tmp_path / "out")
    assert plain["candidates"] == swept["candidates"] and plain["sweeps"] == []
    assert [r["measures"] for r in plain["rows"]] == [r["measures"] for r in swept["rows"]]


def test_an_interrupted_sweep_goes_on(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, real, seen = [*command, "best", "--no-kernel-check", "--sweep", "tau=0,0.05,0.2"], RankingWork.records, []

    def stopped(work: RankingWork, label: str, ranker: Ranker) -> list[Record]:
        seen.append(label)
        if label == "best at tau=0.05" and seen.count(label) == 1:
            real(work, label, ranker)
            raise KeyboardInterrupt
        return real(work, label, ranker)

    monkeypatch.setattr("rerank_lab.eval.work.RankingWork.records", stopped)
    assert main(arguments) == 130 and not (tmp_path / "out" / "results.json").exists()
    kept = {path.name: path.read_text() for path in (tmp_path / "out" / "partial").glob("*tau*")}
    assert len(kept) == 2
    assert main([*arguments, "--resume"]) == 0
    told = {p["value"]: p["latency_ms"]["p50"] for p in load(tmp_path / "out")["sweeps"]}
    for name, value in (("best-at-tau=0.0.jsonl", 0), ("best-at-tau=0.05.jsonl", 0.05)):
        seconds = sorted(json.loads(line)["seconds"] for line in kept[name].splitlines())
        assert told[value] == pytest.approx(500 * (seconds[1] + seconds[2])), "timed anew, so done anew"


def test_a_toml_file_sweeps_too(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[sweep]\nstage1-top-k = [1, 2]\ntau = [0, "auto"]\n')
    assert main([*command, "best", "--config", str(tmp_path / "x.toml")]) == 0
    assert load(tmp_path / "out")["config"]["sweep"] == {"stage1_top_k": [1, 2], "tau": [0.0, "auto"]}
    assert len(load(tmp_path / "out")["sweeps"]) == 4
    assert main([*command, "best", "--config", str(tmp_path / "x.toml"), "--sweep", "tau=0.2", "--overwrite"]) == 0
    assert load(tmp_path / "out")["config"]["sweep"] == {"stage1_top_k": [1, 2], "tau": [0.2]}, "flags win"


def test_only_what_a_value_changes_is_ranked_again(command: list[str], small_cross: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = RankingWork.records, []

    def watched(work: RankingWork, label: str, ranker: Ranker) -> list[Record]:
        seen.append(label)
        return real(work, label, ranker)

    monkeypatch.setattr("rerank_lab.eval.work.RankingWork.records", watched)
    sweeps = ["--sweep", "tau=auto,0.2", "--sweep", "max_tokens_per_doc=254,300,512", "--sweep", "top_k=2,3"]
    assert main([*command, "fast,best,best+cross", "--no-kernel-check", "--model-cross", str(small_cross), *sweeps]) == 0
    assert [label for label in seen if "=" in label] == [  # the bi-encoder reads 254 tokens, this cross-encoder 512 of a pair
        "best at tau=0.2", "best+cross at tau=0.2", "best+cross at max_tokens_per_doc=254", "best+cross at max_tokens_per_doc=300",
        "fast at top_k=2", "best at top_k=2", "best+cross at top_k=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast", "--sweep", "stage1_top_k=5"], "none of the methods that run here has it (fast)"),
        (["best", "--sweep", "tau=0.001"], "tau=0.001: best: tau must be 0 (MaxSim) or at least"),
        (["best", "--sweep", "tau=0", "--sweep", "tau=0.1"], "twice"),
        (["best", "--sweep", "depth=5"], "NAME one of"),
    ],
)
def test_what_cannot_be_swept_is_said(command: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failing(capsys, *command, *arguments)


@pytest.mark.parametrize("text", ["tau", "tau=", "tau=a", "stage1_top_k=0", "stage1_top_k=1.5", "top_k=1,1", "=1"])
def test_malformed_values(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        _sweep(text)
    assert _sweep("stage1-top-k=20,10") == ("stage1_top_k", [10, 20])
