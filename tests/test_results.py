"""What is said of the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from rerank_lab.results import findings


def result(delta: float, p_holm: float) -> dict[str, Any]:
    vs = {"baseline": "fast", "measure": "nDCG@10", "delta": delta, "ci95": [delta - 0.02, delta + 0.02], "p_holm": p_holm}
    rows = [{"method": "fast", "vs": None, "latency_ms": {"p50": 10.0}}, {"method": "best", "vs": vs, "latency_ms": {"p50": 15.0}}]
    return {"config": {"baseline": "fast"}, "rows": rows}


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
