"""The benchmark command: its numbers, its exit statuses, and peers that are absent, crash or are wrong. Speed itself is not tested."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from rerank_kernels import bench, bench_maxsim, bench_peers


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rerank_kernels.bench", *arguments], capture_output=True, text=True, check=False)


def test_quick_json_holds_every_figure() -> None:
    done = command("--device", "cpu", "--quick", "--json", "--peers", "--threads", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["threads"] == 2 and report["implementation"] and report["versions"]["torch"] and "--quick" in report["command"]
    assert len(report["tasks"]) == 4
    for task in report["tasks"]:
        assert task["gemm_gflops"] > 0 and task["read_gbs"] > 0
        rows = {row["name"]: row for row in task["rows"]}
        ours = rows["MaxSim" if "MaxSim" in rows else "similarity_topk"]
        assert ours["slower"] == 1 and ours["ms"] > 0
        timed = [row for row in rows.values() if row["status"] == "ok"]
        assert len(timed) >= 4 and all(math.isclose(row["slower"], row["ms"] / ours["ms"]) and row["of_gemm"] > 0 for row in timed)
        assert all(row["difference"] <= 2e-4 for row in timed if row["name"] != "soft attention")
        peers = {"maxsim-cpu", "fast-maxsim"} if "MaxSim" in rows else {"faiss IndexFlatIP", "faiss, BLAS threshold 20"}
        assert peers <= set(rows)


def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command("--device", "cuda")
    assert done.returncode == 0 and "there is no GPU here" in done.stdout
    assert json.loads(command("--device", "cuda", "--json").stdout)["tasks"] == []


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--threads", "many"], ["--device", "tpu"], ["--nonsense"]])
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_a_result_that_differs_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_maxsim, "packed_maxsim", lambda x, owner: torch.zeros(len(x["pairs"])))
    threads = torch.get_num_threads()
    assert bench.main(["--device", "cpu", "--quick", "--threads", str(threads)]) == 1
    assert "differ from ours: torch packed mm" in capsys.readouterr().err


def test_the_table_has_80_columns_and_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_peers, "missing", lambda name: f"not installed (pip install {bench_peers.PEERS[name][0]})")
    assert bench.main(["--device", "cpu", "--quick", "--peers"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[3:])) <= 80
    assert "not installed (pip install maxsim-cpu)" in out and "not installed (pip install faiss-cpu)" in out
    assert "of GEMM" in out and "vs ours" in out


MODULES = {
    "crashes": ("import os", "    os.abort()"),
    "raises": ("", "    raise TypeError('only squares')"),
    "works": ("import numpy", "    return numpy.array([numpy.max(q @ x.T, 1).sum() for x in documents])"),
    "crashes later": ("import numpy, os\ncalls = []", "    calls.append(1)\n    len(calls) > 1 and os.abort()\n    return numpy.zeros(3)"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_peer_that_crashes_or_raises_takes_nothing_with_it(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head, body = MODULES[name]
    (tmp_path / "maxsim_cpu.py").write_text(f"{head}\ndef maxsim_scores_variable(q, documents):\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    task = bench_maxsim.Ragged(4, documents=3, Lq=2)
    remote = bench_peers.Remote("maxsim-cpu", task, 1)
    try:
        seconds = remote.seconds()
        if name == "works":
            x = task.tensors()
            full, mask = bench_maxsim.padded(x)
            assert remote.result is not None and seconds > 0 and remote.problem is None
            np.testing.assert_allclose(remote.result, bench_maxsim.padded_maxsim(x["q"], full, mask).numpy(), atol=1e-5)
        else:
            assert math.isnan(seconds) and remote.problem is not None
            assert "only squares" in remote.problem if name == "raises" else "crashes (exit status -6)" in remote.problem
    finally:
        remote.close()
