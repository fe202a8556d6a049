"""The eval command as a person uses it: a process, a results folder, an exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from rerank_lab.datasets.runs import read_trec
from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.eval.journal import Journal
from tests.conftest import QUERIES, report_of

COMMAND = [sys.executable, "-m", "rerank_lab.eval"]
ROW = {
    "dataset", "split", "method", "model", "model_cross", "queries", "measures", "ci95", "vs", "settings", "latency_ms", "cold_latency_ms",
    "docs_per_s", "peak_rss_mb", "flops_per_query", "coverage", "truncated_share", "tie_rate",
}  # fmt: skip


def load(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error message of a command that must end with exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own
        code = int(str(stop.code))
    message = capsys.readouterr().err
    assert code == 2 and "Traceback" not in message
    return message


@pytest.fixture
def folder(beir: Callable[..., Path]) -> str:
    return str(beir())


def test_a_whole_evaluation(folder: str, tmp_path: Path, small_cross: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [*COMMAND, "--dataset", folder, "--model-cross", str(small_cross), "--out", str(out), "--cold-queries", "2", "--top-k", "4"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "silent off a TTY where there is nothing to warn of"
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith(("Written to", "As a page"))) and "Written to" in done.stdout, (
        done.stdout
    )
    result = load(out)
    labels = ["fast", "standard", "optimal", "best", "best+cross", "maxsim"]
    assert result["schema"] == 2 and [r["method"] for r in result["rows"]] == labels
    assert {"packages", "cpu", "threads", "device", "python", "commit"} <= result["environment"].keys()
    assert {"hash", "recall@4", "oracle_ndcg@10", "source"} <= result["candidates"].keys()
    for row in result["rows"]:
        assert row.keys() >= ROW
        assert row["measures"].keys() == {"nDCG@10", "RR@10", "AP@100", "R@100", "P@1", "Judged@10"} == row["ci95"].keys()
        assert (row["vs"] is None) == (row["method"] == "fast")
        assert row["latency_ms"]["p95"] >= row["latency_ms"]["p50"] > 0 and row["docs_per_s"] > 0 and row["peak_rss_mb"] > 100
        assert (row["cold_latency_ms"] is None) == (row["method"] == "standard"), "a cross-encoder caches nothing to be cold about"
        assert len(read_trec(out / "runs" / f"{row['method']}.trec")) == len(QUERIES)
    rows = {r["method"]: r for r in result["rows"]}
    assert rows["optimal"]["settings"]["stage1_top_k"] == 2, "half of the candidates, or it would cut nothing"
    assert rows["best"]["model_cross"] is None and rows["best+cross"]["model_cross"] == str(small_cross)
    assert rows["fast"]["model_cross"] is None and rows["standard"]["model"] is None
    assert rows["best"]["flops_per_query"] < rows["best+cross"]["flops_per_query"]
    per_query = pd.read_csv(out / "per_query.csv")
    assert len(per_query) == len(labels) * len(QUERIES)
    for label, row in rows.items():
        assert row["measures"]["nDCG@10"] == pytest.approx(per_query[per_query["method"] == label]["nDCG@10"].mean())
        assert f"{row['measures']['nDCG@10']:.4f}" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == ["per_query.csv", "results.json", "runs", "scores.parquet"]


def test_the_command_in_the_report_gives_the_same_measures(folder: str, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert (
        main(["--dataset", folder, "--methods", "fast,best:tau=0.05", "--out", str(a), "--top-k", "5", "--measures", "nDCG@10,ERR@5", "--cold-queries", "0"])
        == 0
    )
    command = re.search(r"^    (python -m rerank_lab.eval .*)$", report_of(a), re.MULTILINE)
    assert command is not None
    assert main([*command[1].split()[3:], "--out", str(b)]) == 0
    first, second = load(a), load(b)
    assert [r["measures"] for r in first["rows"]] == [r["measures"] for r in second["rows"]]
    assert first["config"] == second["config"] and first["candidates"]["hash"] == second["candidates"]["hash"]
    assert (a / "runs" / "best-tau=0.05.trec").read_text() == (b / "runs" / "best-tau=0.05.trec").read_text()


def test_all_methods_run_without_a_model_named_and_none_leaves_the_cross_encoder_out(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", folder, "--out", str(tmp_path / "all"), "--cold-queries", "1"]) == 0
    rows = {r["method"]: r for r in load(tmp_path / "all")["rows"]}
    assert {name: row["model_cross"] for name, row in rows.items()} == {
        "fast": None, "standard": "minilm-cross", "optimal": "minilm-cross", "best": None, "best+cross": "minilm-cross", "maxsim": None,
    }  # fmt: skip
    assert all(row["cold_latency_ms"]["p50"] > row["latency_ms"]["p50"] for row in rows.values()), "its documents are cached too"
    assert capsys.readouterr().err == ""
    without = ["--dataset", folder, "--model-cross", "none"]
    assert main([*without, "--out", str(tmp_path / "out"), "--cold-queries", "0"]) == 0
    assert [r["method"] for r in load(tmp_path / "out")["rows"]] == ["fast", "best", "maxsim"]
    assert "--model-cross none" in report_of(tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "standard, optimal" in lines[0] and "--model-cross" in lines[0]
    for method in ("standard", "optimal", "best+cross"):
        assert "--model-cross" in failing(capsys, *without, "--methods", f"fast,{method}", "--out", str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_bm25_first_stage_stands_beside_the_methods_and_joins_them(folder: str, tmp_path: Path) -> None:
    for name, extra in (("plain", []), ("fused", ["--fuse-first-stage"])):
        assert main(["--dataset", folder, "--candidates", "bm25", "--methods", "fast", "--cold-queries", "0", "--out", str(tmp_path / name), *extra]) == 0
    plain, fused = load(tmp_path / "plain"), load(tmp_path / "fused")
    assert plain["candidates"]["parameters"]["method"] == "lucene" and 0 < plain["candidates"]["measures"]["nDCG@10"] <= plain["candidates"]["oracle_ndcg@10"]
    assert plain["candidates"]["hash"] == fused["candidates"]["hash"] and fused["config"]["fuse_first_stage"] == 1.0
    assert (tmp_path / "plain" / "scores.parquet").read_bytes() != (tmp_path / "fused" / "scores.parquet").read_bytes()


def test_a_run_file_of_an_evaluation_serves_as_candidates(folder: str, tmp_path: Path) -> None:
    assert main(["--dataset", folder, "--methods", "best", "--out", str(tmp_path / "a"), "--cold-queries", "0"]) == 0
    run = tmp_path / "a" / "runs" / "best.trec"
    assert main(["--dataset", folder, "--methods", "fast", "--candidates", f"run:{run}", "--out", str(tmp_path / "b"), "--cold-queries", "0"]) == 0
    assert load(tmp_path / "b")["candidates"]["measures"] == load(tmp_path / "a")["rows"][0]["measures"]


def test_config_file_and_flags_that_win(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "x.toml"
    config.write_text(f'dataset = "{folder}"\nmethods = ["fast", "best:gamma=0.25"]\ntop-k = 3\ncold_queries = 0\nseed = 5\ndrop-identical-ids = true\n')
    assert main(["--config", str(config), "--top-k", "5", "--out", str(tmp_path / "out")]) == 0
    settings = load(tmp_path / "out")["config"]
    assert (settings["top_k"], settings["seed"], settings["drop_identical_ids"], settings["methods"]) == (5, 5, True, ["fast", "best:gamma=0.25"])
    for text, message in [
        ("topk = 3\nsed = 1", "unknown keys topk, sed"),
        ("top-k = 0", "at least 1"),
        ("top-k = true", "must be a number"),
        ("a = ", "x.toml"),
    ]:
        config.write_text(text)
        assert message in failing(capsys, "--config", str(config))
    assert "No such file" in failing(capsys, "--config", str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fats,best:tua=1,bset"], "'fats'.*'tua=1'.*'bset'"),
        (["--measures", "nDCG@10,nDGC@10,foo"], "nDGC@10, foo.*valid: .*nDCG"),
        (["--methods", "fast,fast"], "twice"),
        (["--methods", ""], "at least one name"),
        (["--baseline", "best", "--methods", "fast"], "--baseline"),
        (["--candidates", "splade"], "valid: bm25, dense, splade:MODEL, run:FILE"),
        (["--candidates", "run:none.trec"], "none.trec: No such file"),
        (["--dataset", "no-such"], "numpydoc"),
        (["--split", "dev"], "it has test"),
        (["--model", "no/such-model"], "all-MiniLM-L6-v2"),
        (["--model-cross", "all-MiniLM-L6-v2", "--methods", "standard"], "is a bi-encoder"),
        (["--device", "tpu9"], "tpu9"),
        (["--top-k", "0"], "at least 1"),
        (["--subspace", "none.safetensors"], "none.safetensors"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--methods", "fats", "--measures", "foo"], "'fats'.*foo"),
        (["--methods", "best:tau= 0.1"], "white space"),
        (["--seed", "99999999999999999999"], r"below 2\^32"),
        (["--device", "meta"], "valid: auto, cpu"),
        (["--measures", "nDCG@0"], "nDCG@0"),
    ],
)
def test_wrong_input_ends_in_exit_2_with_a_remedy_and_leaves_nothing(
    arguments: list[str], message: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failing(capsys, "--dataset", folder, "--out", str(tmp_path / "out"), *arguments)
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_a_malformed_corpus_line_is_named(beir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = beir()
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d9", "text": \n')
    assert f"{folder / 'corpus.jsonl'}:7" in failing(capsys, "--dataset", str(folder))


def test_results_are_not_overwritten_unasked(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, arguments = tmp_path / "out", ["--dataset", folder, "--cold-queries", "0", "--out"]
    assert main([*arguments, str(out), "--methods", "fast,best"]) == 0
    before = (out / "results.json").read_bytes()
    assert "--overwrite" in failing(capsys, *arguments, str(out), "--methods", "fast")
    assert main([*arguments, str(out), "--methods", "fast,best", "--resume"]) == 0 and "finished already" in capsys.readouterr().out
    assert (out / "results.json").read_bytes() == before
    (out / "mine.txt").write_text("kept")
    assert main([*arguments, str(out), "--methods", "fast", "--overwrite"]) == 0
    assert [p.name for p in (out / "runs").iterdir()] == ["fast.trec"] and (out / "mine.txt").read_text() == "kept"
    assert "a file, not a folder" in failing(capsys, *arguments, str(out / "mine.txt"))


def test_default_folders_do_not_collide(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["--dataset", folder, "--methods", "fast", "--cold-queries", "0", "--limit-queries", "2"]) == 0
    names = sorted(p.name for p in (tmp_path / "results").iterdir())
    assert len(names) == 2 and names[1] == names[0] + "-2" and names[0].endswith("-small")
    assert load(tmp_path / "results" / names[0])["rows"][0]["queries"] == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_resume_redoes_nothing_after_an_interruption(how: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run, on the bundled collection, is stopped in the middle of the second method."""
    out = tmp_path / "out"
    arguments = ["--methods", "fast,best", "--limit-queries", "60", "--candidates", "bm25", "--top-k", "5", "--cold-queries", "0"]
    arguments += ["--max-tokens-per-doc", "32", "--out", str(out)]
    journal = out / "partial" / "best.jsonl"
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    process.send_signal(how)
    message = process.communicate()[1]
    if how is signal.SIGINT:
        assert process.returncode == 130 and "--resume" in message and "Traceback" not in message
    assert not (out / "results.json").exists(), "stopped too late to prove anything"
    with journal.open("a") as file:
        file.write('{"query": "torn in the mid')
    kept = {p.name: p.read_text().splitlines() for p in (out / "partial").glob("*.jsonl")}
    assert len(kept["fast.jsonl"]) == 60 and 5 <= len(kept["best.jsonl"]) - 1 < 60

    assert "interrupted run" in failing(capsys, *arguments)
    assert "differs in seed" in failing(capsys, *arguments, "--resume", "--seed", "9")

    subprocess.run([*COMMAND, *arguments, "--resume"], check=True, capture_output=True, cwd=tmp_path)
    per_query = pd.read_csv(out / "per_query.csv")
    for label, lines in kept.items():
        rows = per_query[per_query["method"] == label.removesuffix(".jsonl")].set_index("query")
        assert len(rows) == 60
        for line in lines[: -1 if label == "best.jsonl" else None]:
            record = json.loads(line)
            assert rows.loc[record["query"], "latency_ms"] == pytest.approx(1000 * record["seconds"]), "timed anew, so done anew"


def test_an_interrupted_overwrite_is_resumed_not_taken_for_the_old_run(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, arguments = tmp_path / "out", ["--dataset", folder, "--cold-queries", "0", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--methods", "fast"]) == 0
    assert "differs in methods" in failing(capsys, *arguments, "--methods", "fast,best", "--resume")
    (out / "partial").mkdir()  # what --overwrite leaves when it is killed
    assert main([*arguments, "--methods", "fast,best", "--resume"]) == 0
    assert [r["method"] for r in load(out)["rows"]] == ["fast", "best"] and not (out / "partial").exists()


def test_overwrite_with_wrong_input_keeps_the_interrupted_run(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = tmp_path / "out" / "partial"
    partial.mkdir(parents=True)
    (partial / "fast.jsonl").write_text("kept")
    failing(capsys, "--dataset", folder + "-misspelt", "--out", str(tmp_path / "out"), "--overwrite")
    assert (partial / "fast.jsonl").read_text() == "kept"
    assert main(["--dataset", folder, "--methods", "fast", "--cold-queries", "0", "--out", str(tmp_path / "out"), "--overwrite"]) == 0
    assert not partial.exists()


@pytest.mark.parametrize("content", ["{bad", "[]", "{}"])
def test_damaged_files_of_a_run_offer_a_way_out(folder: str, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", folder, "--cold-queries", "2", "--methods", "fast", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    for path in Path(os.environ["RERANK_LAB_CACHE"]).glob("timings/*.json"):
        path.write_text(content)
    assert main([*arguments, "--overwrite"]) == 0 and load(tmp_path / "out")["rows"][0]["cold_sample"]["queries"] == 2
    (tmp_path / "out" / "results.json").write_text(content)
    assert "--overwrite" in failing(capsys, *arguments, "--resume")


def test_an_unwritable_cache_costs_only_the_caching(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--dataset", folder, "--methods", "fast", "--cold-queries", "1", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "file")]) == 0
    assert load(tmp_path / "out")["environment"]["vector_cache"] == "memory"


def test_an_unwritable_out_is_known_before_any_work(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in failing(capsys, "--dataset", "no-such", "--out", str(tmp_path / "file" / "x"))


def test_one_query_gets_no_interval(folder: str, tmp_path: Path) -> None:
    assert main(["--dataset", folder, "--methods", "fast,best", "--limit-queries", "1", "--cold-queries", "0", "--out", str(tmp_path / "out")]) == 0
    row = load(tmp_path / "out")["rows"][1]
    assert row["ci95"]["nDCG@10"] is None and row["vs"]["ci95"] is None and "cannot be told" in report_of(tmp_path / "out")


def test_resume_without_out_finds_the_interrupted_run_of_this_collection(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2020-01-01-small", "2020-01-02-small", "2020-01-03-very-small", "2020-01-04-small-thing"):
        (tmp_path / "results" / name).mkdir(parents=True)
    (tmp_path / "results" / "2020-01-01-small" / "partial").mkdir()
    assert main(["--dataset", folder, "--methods", "fast", "--cold-queries", "0", "--resume"]) == 0
    assert (tmp_path / "results" / "2020-01-01-small" / "results.json").is_file()


def test_a_journal_refuses_another_configuration(tmp_path: Path) -> None:
    Journal(tmp_path, resume=False, overwrite=False).begin({"a": 1, "b": [1.5]})
    Journal(tmp_path, resume=True, overwrite=False).begin({"a": 1, "b": [1.5]})
    with pytest.raises(UserError, match="differs in a, c"):
        Journal(tmp_path, resume=True, overwrite=False).begin({"a": 2, "b": [1.5], "c": None})


def test_cold_timings_are_kept_until_something_changes(folder: str, tmp_path: Path) -> None:
    arguments = ["--dataset", folder, "--methods", "fast", "--cold-queries", "2", "--out"]
    for name, extra in (("a", []), ("b", []), ("c", ["--max-tokens-per-doc", "8"])):
        assert main([*arguments, str(tmp_path / name), *extra]) == 0
    with (Path(folder) / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "far", "text": "Nothing like the others."}\n')
    assert main([*arguments, str(tmp_path / "d"), "--top-k", "6"]) == 0
    a, b, c, d = (load(tmp_path / name)["rows"][0] for name in "abcd")
    assert d["cold_latency_ms"] != a["cold_latency_ms"]
    assert a["cold_latency_ms"] == b["cold_latency_ms"] and a["cold_sample"] == b["cold_sample"]
    assert c["cold_latency_ms"] != a["cold_latency_ms"] and c["cold_sample"]["queries"] == 2


def test_every_backend_gives_the_same_measures_and_the_results_name_it(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, scores = {}, {}
    for name in ("reference", "cpu", "triton"):
        arguments = ["--dataset", folder, "--methods", "fast,best", "--kernels", name, "--device", "cpu", "--cold-queries", "0", "--no-kernel-check"]
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
        results[name], scores[name] = load(tmp_path / name), pd.read_parquet(tmp_path / name / "scores.parquet")
    assert [results[name]["environment"]["kernels"].partition(" (")[0] for name in results] == ["reference", "cpu", "triton"]
    assert "kernels cpu (" in report_of(tmp_path / "cpu")
    for name in ("cpu", "triton"):
        assert [row["measures"] for row in results[name]["rows"]] == [row["measures"] for row in results["reference"]["rows"]]
        pd.testing.assert_frame_equal(scores[name], scores["reference"], atol=1e-2 if name == "triton" else 1e-4, rtol=0)  # z stretches rounding to fp16


def test_kernels_that_cannot_run_here_are_wrong_input(folder: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [*COMMAND, "--dataset", folder, "--methods", "fast", "--kernels", "triton", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2 and "--kernels triton: backend 'triton' runs on CUDA tensors" in done.stderr
    assert not (tmp_path / "out").exists()


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for name in ("all-MiniLM-L6-v2", "bi-encoder", "fast", "standard", "optimal", "best", "maxsim", "tau=auto", "numpydoc", "nDCG"):
        assert name in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_help_teaches_in_80_columns() -> None:
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"})
    assert "examples:" in done.stdout and "exit codes" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.fixture(autouse=True)
def same_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
