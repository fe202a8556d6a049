"""The benchmark of models: every contender does the same work and finds the same, and a process of its own measures its memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DOCUMENTS, ROOT

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
import bench_models as script

LINE = re.compile(r"^(encode|pairs|late|seen|one-way|causal|tokens) +(\S.*?) +([\d.]+) +(\S+) +(\S+) +(\S+)$", re.MULTILINE)


@pytest.fixture
def run(beir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    folder = str(beir())

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench_models", "--dataset", folder, "--pairs", "12", "--rounds", "1", *flags])
        assert script.main() == 0
        return capsys.readouterr().out

    return call


def test_every_row_prints_what_it_found(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "peak", lambda options, row, name: "9")
    monkeypatch.setattr(script, "QUERIES", 2), monkeypatch.setattr(script, "CANDIDATES", 6)
    out = run()
    rows = LINE.findall(out)
    found = {name: (float(ratio), apart, share) for _, name, ratio, apart, share, _ in rows}
    assert {row for row, *_ in rows} == {"encode", "pairs", "late", "seen", "one-way", "causal", "tokens"}
    for first in ("SentenceTransformer.encode", "CrossEncoder.predict", "MultiVectorEncoder", "fast, documents new"):
        assert found[first][0] == 1.0
    assert sum(apart == "-" for _, apart, _ in found.values()) == 6, "rows without scores to compare"
    for row, name, _, _, share, _ in rows:
        # The model of the row `causal` is so small that its share of the processor's rate rounds to 0.
        assert (0 if row == "causal" else 0.01) <= float(share) < 20 if name in ("ours, fp32", "ours, bf16") else share == "-"
    for name, (_, apart, _) in found.items():
        assert apart == "-" or float(apart) < (0.02 if "bf16" in name else 1e-4), name
    assert found["fast, seen"][0] > 1 and found["minilm-cross, seen"][0] > found["minilm-cross, documents new"][0]
    assert f"{len(DOCUMENTS)} documents of small, 12 pairs" in out and len(re.findall(r"p95 [\d.]+ x the median forward", out)) == 2
    if "pylate.rank.rerank" not in found:
        assert "pylate.rank.rerank: left out, not installed: pip install pylate" in out
    assert max(len(line) for line in out.splitlines() if "median forward" not in line) <= 80


def test_memory_is_a_process_of_its_own(run: Callable[..., str]) -> None:
    light = script.peak(script.parser().parse_args(["--documents", "3", "--pairs", "3"]), "encode", "ours, fp32")
    assert 100 < float(light) < 3000
    assert script.peak(script.parser().parse_args(["--dataset", "none-such"]), "encode", "ours, fp32") == "-"


def test_wrong_flags_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in ((["--pairs", "0"], "--pairs"), (["--only", "nonsense"], "nonsense"), (["--also", "onnx:fp33"], "fp33")):
        monkeypatch.setattr(sys, "argv", ["bench_models", *flags])
        with pytest.raises(SystemExit) as stop:
            script.main()
        assert stop.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench_models", "--dataset", "none-such"])
    assert script.main() == 2 and "none-such" in capsys.readouterr().err
