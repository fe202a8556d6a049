"""The kernel check of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rerank_lab.eval import kernel_check
from rerank_lab.eval.__main__ import main
from rerank_lab.eval.kernel_check import CHECKED_DTYPES, CastReranker
from rerank_lab.reranker import Reranker
from tests.conftest import DOCUMENTS
from tests.eval.test_eval import load

TEXTS = [f"{title} {text}" for title, text in DOCUMENTS.values()]
LIMITS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "fp8": 0.2}


@pytest.mark.parametrize("method", ["fast", "best"])
@pytest.mark.parametrize("name", CHECKED_DTYPES)
def test_the_kernels_are_as_near_as_their_type_of_number(reranker: Reranker, method: str, name: str) -> None:
    row = reranker.using(method)
    plain = row.score("join two tables", TEXTS)
    exact = CastReranker(row, torch.float32, {}, "reference").score("join two tables", TEXTS)
    cast = CastReranker(row, CHECKED_DTYPES[name], {}).score("join two tables", TEXTS)
    assert sorted(cast.order) == sorted(plain.order)
    by_place = [torch.zeros(len(TEXTS), dtype=torch.float64).index_copy_(0, torch.tensor(r.order), r.relevance) for r in (exact, cast)]
    gap = float((by_place[0] - by_place[1]).abs().max())
    assert gap <= LIMITS[name], gap
    if name not in ("fp32", "fp16"):
        assert gap > LIMITS["fp32"], "nothing was cast"


def test_results_hold_what_the_kernels_change(
    beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", str(beir()), "--methods", "fast,standard,best,best+cross", "--cold-queries", "0", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert "kernels and definition" in capsys.readouterr().out
    rows = {r["method"]: r["vs_definition"] for r in load(tmp_path / "a")["rows"]}
    assert rows["standard"] is None and rows["best+cross"] is None and rows["fast"].keys() == rows["best"].keys() == CHECKED_DTYPES.keys()
    assert rows["best"]["fp32"]["delta_ndcg@10"] == 0 and rows["best"]["fp32"]["queries"] == 4
    assert rows["best"]["fp32"]["max_score_diff"] < 1e-5 < rows["best"]["fp8"]["max_score_diff"]

    def wrong(query: torch.Tensor, documents: torch.Tensor, k: int, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, k), torch.arange(k)[None]

    monkeypatch.setattr(kernel_check, "similarity_topk", wrong)
    real = kernel_check.CastReranker.score

    def honest_definition(self: CastReranker, *given: object, **more: object) -> object:
        with monkeypatch.context() as patch:
            if self.backend == "reference":
                from rerank_kernels import similarity_topk

                patch.setattr(kernel_check, "similarity_topk", similarity_topk)
            return real(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_check.CastReranker, "score", honest_definition)
    assert main([*arguments, str(tmp_path / "b")]) == 0
    broken = load(tmp_path / "b")["rows"][0]["vs_definition"]["fp32"]
    assert broken["max_score_diff"] > 0.1 and broken["overlap@10"] == 1 > broken["kendall_tau"]
    assert main([*arguments, str(tmp_path / "c"), "--no-kernel-check"]) == 0
    assert [r["vs_definition"] for r in load(tmp_path / "c")["rows"]] == [None] * 4
