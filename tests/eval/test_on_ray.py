"""The eval command on a real Ray cluster with two workers on this machine: results stay the same, even if workers die."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from rerank_lab.eval.__main__ import main
from tests.conftest import ROOT
from tests.eval.on_a_cluster import ENCODING, RANKING, assert_same_results, ended, ftp_server, killing, load, processes

ray = pytest.importorskip("ray", reason="no ray: pip install -e '.[dev]'")

WHAT = [
    "--methods", "fast,standard,best", "--limit-queries", "20", "--top-k", "20", "--max-tokens-per-doc", "24", "--cold-queries", "1", "--no-kernel-check",
    "--sweep", "tau=auto,0.2", "--threads", "1",
]  # fmt: skip
ON_RAY = ["--executor", "ray", "--address", "local"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all tests of this module that do not end their own."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the local run, from an empty cache."""
    out = tmp_path_factory.mktemp("reference")
    assert main([*WHAT, "--cache", str(out / "cache"), "--out", str(out / "out")]) == 0
    return out / "out"


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls, so that there are more of them to lose."""
    monkeypatch.setattr("rerank_lab.eval.executors.ray.QUERIES", 3)


@pytest.mark.usefixtures("cluster", "small_calls")
def test_two_workers_of_which_some_are_killed_give_the_local_results(reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a remote cache: vectors, texts and plans are on a server, and this machine has only copies."""
    with ftp_server(tmp_path / "there") as url, killing([ENCODING, RANKING], seed=time.time_ns() % 1000) as killed:
        assert main([*WHAT, *ON_RAY, "--workers", "2", "--cache", f"{url}/cache", "--out", str(tmp_path / "out")]) == 0
    assert_same_results(reference, tmp_path / "out")
    said = capfd.readouterr()
    assert killed == [ENCODING, RANKING], killed
    assert "done again" in said.err and "is gone" in said.err, said.err
    assert "raylet" not in said.out, "what befalls workers is no part of the results"
    there = {path.relative_to(tmp_path / "there" / "cache").parts[0] for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert there == {"vectors", "texts", "plans", "timings"}
    executor = load(tmp_path / "out")["environment"]["executor"]
    assert (executor["name"], executor["workers"], executor["resources"]) == ("ray", 2, {"CPU": 1.0})


@pytest.mark.slow
@pytest.mark.usefixtures("cluster", "small_calls")
def test_ten_random_kills(reference: Path, tmp_path: Path) -> None:
    for seed in range(5):
        with killing([ENCODING, RANKING], seed, wait=4.0):
            assert main([*WHAT, *ON_RAY, "--workers", "2", "--cache", str(tmp_path / f"cache{seed}"), "--out", str(tmp_path / f"out{seed}")]) == 0
        assert_same_results(reference, tmp_path / f"out{seed}")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_one_worker_gives_the_local_results(reference: Path, tmp_path: Path) -> None:
    assert main([*WHAT, *ON_RAY, "--workers", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]) == 0
    assert_same_results(reference, tmp_path / "out")


def test_ctrl_c_then_kill_then_resume(reference: Path, tmp_path: Path) -> None:
    """No process is left running, no query is ranked twice, and vectors of a local run are not encoded again."""
    out = tmp_path / "out"
    shutil.copytree(reference.parent / "cache", tmp_path / "cache")
    encoded = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    command = [sys.executable, "-m", "rerank_lab.eval", *WHAT, *ON_RAY, "--workers", "2", "--cache", str(tmp_path / "cache"), "--out", str(out), "--resume"]

    def stopped(how: signal.Signals, after: Callable[[], bool]) -> tuple[int, str, list[int]]:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not after():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        below = [pid for pid, name in processes(process.pid).items() if "Agent" not in name]  # of Ray's, which report to the dead for a minute
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        return process.returncode, said, below

    def lines(name: str) -> list[str]:
        path = out / "partial" / f"{name}.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    code, said, below = stopped(signal.SIGINT, lambda: len(lines("fast")) > 0)
    assert code == 130 and "--resume" in said and "Traceback" not in said, said
    assert len(below) > 4 and ended(below, 10.0), "Ctrl-C ends the cluster"
    first = lines("fast")
    code, _, below = stopped(signal.SIGKILL, lambda: len(lines("standard")) > 0)
    assert code == -signal.SIGKILL and ended(below), "what Ray started ends with its driver"
    assert lines("fast")[: len(first)] == first, "done before, so not done again"
    second = lines("standard")
    done = subprocess.run([*command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.count("\n") <= 2, done.stderr
    assert_same_results(reference, out)
    assert {path.name for path in (tmp_path / "cache" / "vectors").rglob("*.safetensors")} <= encoded
    timed = pd.read_csv(out / "per_query.csv").set_index(["method", "query"])["latency_ms"]
    for label, records in (("fast", first), ("standard", second[:-1])):
        for record in map(json.loads, records):
            assert timed[label, record["query"]] == pytest.approx(1000 * record["seconds"]), "timed anew, so done anew"
