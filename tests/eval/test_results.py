"""Results as a file and as text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rerank_lab.eval import results
from rerank_lab.eval.results import Latency, Results
from rerank_lab.eval.table import findings
from tests.conftest import ROOT

BASELINE = sorted((ROOT / "reports" / "baseline").glob("*.json"))


def result(delta: float, p_holm: float) -> Results:
    baseline = results.read(ROOT / "reports" / "baseline" / "numpydoc.json")
    fast, best = (next(row for row in baseline.rows if row.label == label) for label in ("fast", "best"))
    assert best.vs is not None
    vs = replace(best.vs, delta=delta, ci95=[delta - 0.02, delta + 0.02], p_holm=p_holm)
    return replace(baseline, rows=[replace(fast, latency_ms=Latency(10.0, 20.0)), replace(best, vs=vs, latency_ms=Latency(15.0, 20.0))])


@pytest.mark.parametrize(
    ("delta", "p_holm", "said"),
    [
        (0.1, 0.01, "best beats fast: +0.100 [+.080, +.120] nDCG@10, Holm p .010, at 1.5 x its median latency"),
        (-0.1, 0.0004, "best is worse than fast: -0.100 [-.120, -.080] nDCG@10, Holm p <.001"),
        (0.1, 0.05, "best cannot be told from fast: +0.100"),
    ],
)
def test_a_method_wins_only_past_chance(delta: float, p_holm: float, said: str) -> None:
    assert [sentence.startswith(said) for sentence in findings(result(delta, p_holm))] == [True]


@pytest.mark.parametrize("path", BASELINE, ids=lambda path: path.stem)
def test_a_file_comes_back_as_it_was(path: Path) -> None:
    text = path.read_text()
    again = json.loads(results.write(results.parse(json.loads(text))))
    assert again["environment"].pop("timed_by") == [] and again.pop("files") == {}, "what this file's release did not say"
    assert again == json.loads(text)


def test_a_ceiling_of_another_measure_than_the_first_keeps_its_name() -> None:
    """In files of early releases, ceilings are of nDCG@10 and not of the first measure."""
    value = json.loads(BASELINE[0].read_text())
    value["config"]["measures"] = sorted(value["config"]["measures"])
    found = results.parse(value)
    change = (found.rows[0].vs_definition or {})["fp32"]
    assert (found.primary, found.ceiling_measure, change.measure) == ("AP@100", "nDCG@10", "nDCG@10")
    again = json.loads(results.write(found))
    assert again["candidates"] == value["candidates"] and again["sweeps"] == value["sweeps"] and again["rows"] == value["rows"]
