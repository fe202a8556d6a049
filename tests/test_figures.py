"""Published and promised figures, on collections that are not part of the project (RERANK_LAB_DATA)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rerank_lab.datasets import load_dataset
from rerank_lab.eval.__main__ import main
from rerank_lab.first_stage.base import TopK
from rerank_lab.first_stage.candidates import make_candidates
from rerank_lab.measures.quality import measure_run


def evaluated(folder: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["--dataset", str(folder), "--out", str(out), "--cold-queries", "0", *arguments]) == 0
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def measures(result: dict[str, Any], name: str) -> dict[str, float]:
    return {row["method"]: row["measures"][name] for row in result["rows"]}


@pytest.mark.slow
def test_cranfield(collection: Callable[[str], Path], tmp_path: Path) -> None:
    ndcg = measures(evaluated(collection("cranfield"), tmp_path / "out", "--methods", "fast,best"), "nDCG@10")
    assert ndcg["fast"] == pytest.approx(0.3736, abs=0.001)
    assert ndcg["best"] >= 0.400
    assert measures(evaluated(collection("cranfield"), tmp_path / "definition", "--methods", "fast,best", "--kernels", "reference"), "nDCG@10") == ndcg


def test_bm25_on_scifact(collection: Callable[[str], Path]) -> None:
    dataset = load_dataset(str(collection("scifact")))

    def not_needed(*_: object) -> list[TopK]:
        raise AssertionError("BM25 needs no vectors")

    found = make_candidates("bm25", dataset, 100, search=not_needed, drop_identical=False, progress=lambda items, _: items)
    assert measure_run(found.run, dataset.qrels, ["nDCG@10"])["nDCG@10"].mean() == pytest.approx(0.679, abs=0.002)


def test_the_shipped_cross_encoder_beats_the_cosine_that_it_starts_from(tmp_path: Path) -> None:
    """It uses some of numpydoc's test queries, so that wrongly merged weights are found even without other collections."""
    arguments = ["--methods", "fast,standard", "--candidates", "bm25", "--top-k", "20", "--limit-queries", "40", "--max-tokens-per-doc", "128"]
    arguments += ["--no-kernel-check"]
    ndcg = measures(evaluated(Path("numpydoc"), tmp_path / "out", *arguments), "nDCG@10")
    assert ndcg["standard"] >= ndcg["fast"] + 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("name", "standard", "both"), [("scifact", 0.728, 0.7295), ("cranfield", 0.400, 0.4035)])
def test_cross_encoder(collection: Callable[[str], Path], tmp_path: Path, name: str, standard: float, both: float) -> None:
    result = evaluated(collection(name), tmp_path / "out")
    ndcg, flops = measures(result, "nDCG@10"), {row["method"]: row["flops_per_query"] for row in result["rows"]}
    assert ndcg["standard"] >= standard and ndcg["best+cross"] >= both
    assert ndcg["optimal"] >= ndcg["standard"] - 0.003 and flops["optimal"] <= 0.55 * flops["standard"]
    assert ndcg["best+cross"] >= ndcg["best"] - 0.003 and ndcg["standard"] >= ndcg["fast"]


@pytest.mark.slow
def test_scifact_and_a_second_run_from_the_cache(collection: Callable[[str], Path], tmp_path: Path) -> None:
    folder, seconds = collection("scifact"), []
    for name in ("first", "second"):
        start = time.perf_counter()
        result = evaluated(folder, tmp_path / name, "--methods", "fast,best")
        seconds.append(time.perf_counter() - start)
    assert measures(result, "nDCG@10")["fast"] == pytest.approx(0.6451, abs=0.0005)
    assert measures(result, "R@100")["fast"] == pytest.approx(0.9250, abs=0.0005)
    assert measures(result, "nDCG@10")["best"] >= 0.710
    assert seconds[0] >= 10 * seconds[1]
    definition = evaluated(folder, tmp_path / "definition", "--methods", "fast,best", "--kernels", "reference")
    for method, value in measures(definition, "nDCG@10").items():
        assert value == pytest.approx(measures(result, "nDCG@10")[method], abs=5e-5)
