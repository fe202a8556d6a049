"""The benchmark at scale: in blocks it finds the same as brute force, and it refuses what does not fit on the disk."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from rerank_lab.models.base import Detail
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
import bench_scale as script


def test_blocks_find_what_the_whole_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SHARD", 64), monkeypatch.setattr(script, "BLOCK", 100), monkeypatch.setattr(script, "K", 20)
    cache, keys = script.filled(tmp_path, 300), [script.key(n) for n in range(300)]
    query = script.made(10**6, 10**6 + 1)
    whole = cache.gather(keys, Detail.TOKENS)
    for found, scores in (
        (script.search(cache, keys, query), (query.pooled @ whole.pooled.T)[0]),
        (script.scan(cache, keys, query), script.attended(query, whole, 0)[0][0]),
    ):
        wanted = torch.sort(scores, descending=True, stable=True)
        torch.testing.assert_close(found[0][0], wanted.values[:20], atol=1e-5, rtol=0)
        assert found[1][0].tolist() == wanted.indices[:20].tolist()
    files = sorted(tmp_path.rglob("*.safetensors"))
    script.filled(tmp_path, 300)
    assert sorted(tmp_path.rglob("*.safetensors")) == files, "what is there is used again"


def test_a_run_prints_its_slopes_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "scale.svg"
    monkeypatch.setattr(sys, "argv", ["bench_scale", "--work", str(tmp_path), "--documents", "2500", "--rounds", "1", "--plot", str(plot)])
    assert script.main() == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^ +([\d,]+) +[\d.]+ +([\d.]+) +([\d.]+) +([\d.]+) +[\d,]+$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["1,000", "2,500"] and all(float(cell) > 0 for row in rows for cell in row[1:])
    assert re.search(r"search -?[\d.]+, scan -?[\d.]+, rerank -?[\d.]+", out) and b"<svg" in plot.read_bytes()
    assert max(map(len, out.replace(str(plot), "").splitlines())) <= 80


def test_a_disk_that_is_too_small_is_found_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_scale", "--work", str(tmp_path), "--documents", "5000"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10**7}))
    assert script.main() == 2 and "0.0 GB free: fewer documents" in capsys.readouterr().err and not list(tmp_path.rglob("*.safetensors"))
