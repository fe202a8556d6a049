"""The server's benchmark: real servers under every load, and a peer that is not infinity."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rerank_lab.client.v3 import V3
from tests.conftest import DOCUMENTS, ROOT
from tests.serving import Server

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
import bench_server as script


def test_every_load_is_answered_and_printed_in_80_columns(
    beir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"CLIENTS": (1, 2, 3), "SHARES": (0.5,), "DOCUMENTS": 3, "SEEN": len(DOCUMENTS)}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # this process goes on with other tests
    monkeypatch.setattr(sys, "argv", ["bench_server", "--dataset", str(beir()), "--rounds", "1", "--seconds", "0.4", "--threads", "1"])
    assert script.main() == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\w+) +\| +([\d.]+) \| +([\d.]+|nan) \| +([\d,]+|nan) \| +([\d.]+|nan) \| +([\d.]+|nan) \|", printed, re.MULTILINE)
    assert [(name, load) for name, load, *_ in rows] == [("ours", load) for load in ("1", "2", "0.5", "3")] + [
        (name, load) for name in ("fast", "best", "standard") for load in "123"
    ]
    answered = [row for row in rows if float(row[2]) > 0]
    assert len(answered) >= len(rows) // 2, "on a busy machine no answer may come within so short a load"
    assert all(0 < float(p50) <= float(p95) for *_, p50, p95 in answered)
    assert len(re.findall(r"^p50 of (?:ours|fast), .* ms by HTTP, .* in process", printed, re.MULTILINE)) == 2
    assert max(map(len, printed.splitlines())) <= 80


def test_an_answer_that_is_no_200_is_a_failure_with_its_words(server: Server) -> None:
    case = script.RequestKind(server.port, V3, {"model": "all-MiniLM-L6-v2"}, None)  # type: ignore[arg-type]
    with pytest.raises(script.ServerFailed, match=r"401.*known key"):
        asyncio.run(case.send(("q", ["a"])))


def test_a_python_without_infinity_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_server", "--infinity", sys.executable])
    assert script.main() == 2 and "imports infinity_emb" in capsys.readouterr().err
