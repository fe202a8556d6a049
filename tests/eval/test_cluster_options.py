"""Errors of --executor ray that are found before any work begins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rerank_lab.eval.__main__ import main

ON_RAY = ["--executor", "ray", "--address", "local"]


def test_without_ray_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*ON_RAY, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'rerank_lab[ray]'" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "--workers: with --executor ray alone"),
        (["--executor", "ray", "--no-cache"], "--no-cache"),
        (["--executor", "ray", "--address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--executor", "ray", "--resources", "GPU"], "no NAME=NUMBER"),
        ([*ON_RAY, "--resources", "CPU=1000"], "no node of the cluster has as much"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    try:
        code = main([*arguments, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
