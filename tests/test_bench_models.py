"""The benchmark runs on what it is given and prints every contender."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DOCUMENTS, QUERIES, ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import bench_models as script


def test_every_contender_is_timed_on_the_same_pairs(beir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROUNDS", 1)
    printed = script.run(script.parser().parse_args(["--dataset", str(beir()), "--queries", "2"]))
    assert f"2 queries x {len(DOCUMENTS)} documents of small" in printed and len(QUERIES) > 2
    rows = re.findall(r"^(.+?)\s+([\d.]+)\s+([\d.]+) +[\d.]+ to [\d.]+$", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["CrossEncoder.predict", "standard, documents new", "standard, documents cached"]
    assert float(rows[0][2]) == 1 and float(rows[2][1]) > float(rows[1][1]) > 0, "cached documents cost less than new ones"


def test_wrong_flags_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_models", "--queries", "0"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "at least 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench_models", "--dataset", "none-such"])
    assert script.main() == 2 and "none-such" in capsys.readouterr().err
