"""Ways in which rerankers are measured wrongly. Each test fails with the naive code, which is shown if it is short."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import pytest
import torch

from rerank_kernels import similarity_topk
from rerank_lab import Reranker
from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.runs import Ranked, order, read_trec, tie_rate, trec_lines
from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.first_stage.candidates import oracle
from rerank_lab.measures.quality import coverage, measure_run, parse_measures, unjudged_share
from rerank_lab.timing import Clock
from tests.conftest import DOCUMENTS, QRELS, QUERIES


def ranked(*documents: str, scores: list[float] | None = None) -> Ranked:
    values = scores if scores is not None else list(range(len(documents), 0, -1))
    return Ranked(list(documents), np.array(values, dtype=np.float32))


def evaluated(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["--out", str(out), "--cold-queries", "0", *arguments]) == 0
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def test_equal_scores_keep_input_order() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.9, 0.5] * 20)
    places = order(scores)
    assert places.tolist() == sorted(range(100), key=lambda i: (-scores[i], i))
    assert places.tolist() != np.argsort(scores)[::-1].tolist()  # the naive code


def test_a_nan_is_never_sorted() -> None:
    with pytest.raises(ValueError, match="NaN"):
        order([0.1, float("nan")])


def test_trec_eval_cannot_reorder_ties(tmp_path: Path) -> None:
    """trec_eval sorts again, and puts equal scores in descending order of id. With raw scores z would be first."""
    run, qrels = {"q": ranked("a", "m", "z", scores=[0.5, 0.5, 0.5])}, {"q": {"a": 1}}
    assert measure_run(run, qrels, ["nDCG@10", "P@1", "AP@100"]).iloc[0].tolist() == [1.0, 1.0, 1.0]
    naive = [ir_measures.ScoredDoc("q", d, 0.5) for d in "amz"]
    assert next(iter(ir_measures.iter_calc([ir_measures.RR], [ir_measures.Qrel("q", "a", 1)], naive))).value < 1
    path = tmp_path / "x.trec"
    path.write_text("".join(trec_lines(run, "x")))
    by_file = ir_measures.calc_aggregate([ir_measures.RR], [ir_measures.Qrel("q", "a", 1)], ir_measures.read_trec_run(str(path)))
    assert by_file[ir_measures.RR] == 1.0
    assert read_trec(path)["q"].documents == ["a", "m", "z"]


@pytest.mark.parametrize("name", ["nDCG@0", "P@0", "RR@0", "NumRel", "NumQ"])
def test_a_measure_that_crashes_or_is_no_mean_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        parse_measures([name])


def test_run_files_hold_ranks_and_raw_scores_stand_beside(beir: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(out, "--dataset", str(beir()), "--methods", "fast")
    scores = pd.read_parquet(out / "scores.parquet")
    run = read_trec(out / "runs" / "fast.trec")
    for q, rows in scores.groupby("query", sort=False):
        assert run[q].documents == rows["document"].tolist()
        assert run[q].scores.tolist() == list(range(len(rows), 0, -1))
        assert rows["score"].dtype == np.float32 and rows["score"].is_monotonic_decreasing and rows["score"].max() <= 1
    reranker = Reranker(method="fast", device="cpu")
    texts = {d: f"{title} {text}".strip() for d, (title, text) in DOCUMENTS.items()}
    first = scores[scores["query"] == "q1"]
    ranking = reranker.score(QUERIES["q1"], [texts[d] for d in first["document"]])
    np.testing.assert_allclose(first["score"], ranking.scores.numpy(), atol=1e-5)


def test_ties_are_reported() -> None:
    run = {"q": ranked("a", "b", "c", "d", scores=[2, 2, 2, 1]), "p": ranked("a", scores=[1])}
    assert tie_rate(run) == pytest.approx(2 / 5)


def test_repeated_documents_show_as_ties(beir: Callable[..., Path], tmp_path: Path) -> None:
    folder = beir(documents=DOCUMENTS | {"d7": DOCUMENTS["d1"]})
    assert evaluated(tmp_path / "out", "--dataset", str(folder), "--methods", "fast")["rows"][0]["tie_rate"] == pytest.approx(1 / 7)


def test_queries_without_candidates_score_zero_and_count() -> None:
    frame = measure_run({"q1": ranked("d1")}, QRELS, ["nDCG@10", "Judged@10"])
    assert frame.index.tolist() == list(QRELS) and frame["nDCG@10"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert coverage({"q1": ranked("d1")}, QRELS) == 0.25
    # The naive code averages what the library returns, which may leave out queries.
    assert frame["nDCG@10"].mean() == 0.25


def test_a_query_that_bm25_cannot_answer_lowers_the_mean(beir: Callable[..., Path], tmp_path: Path) -> None:
    folder = beir(queries=QUERIES | {"q5": "zzzz"}, qrels=QRELS | {"q5": {"d1": 1}})
    result = evaluated(tmp_path / "out", "--dataset", str(folder), "--methods", "fast", "--candidates", "bm25")
    row, per_query = result["rows"][0], pd.read_csv(tmp_path / "out" / "per_query.csv")
    assert row["queries"] == 5 == len(per_query) and row["coverage"] < 1 and result["candidates"]["queries_without"] >= 1
    assert per_query.set_index("query").loc["q5", "nDCG@10"] == 0
    assert row["measures"]["nDCG@10"] == pytest.approx(per_query["nDCG@10"].sum() / 5)


def test_the_ideal_ranking_knows_relevant_documents_that_were_not_candidates() -> None:
    qrels = {"q": {"a": 1, "b": 1, "c": 1}}
    value = measure_run({"q": ranked("a")}, qrels, ["nDCG@10"])["nDCG@10"].iloc[0]
    assert value == pytest.approx(1 / (1 + 1 / np.log2(3) + 1 / 2))
    naive = measure_run({"q": ranked("a")}, {"q": {"a": 1}}, ["nDCG@10"])["nDCG@10"].iloc[0]
    assert naive == 1.0


def test_judgements_of_documents_that_the_corpus_lacks_stay_in_the_ideal(beir: Callable[..., Path]) -> None:
    dataset = load_dataset(str(beir(qrels={"q1": {"d1": 1, "gone": 1}})))
    assert measure_run({"q1": ranked("d1")}, dataset.qrels, ["nDCG@10"])["nDCG@10"].iloc[0] < 1


def test_relevant_documents_are_never_injected(beir: Callable[..., Path], tmp_path: Path) -> None:
    trec = tmp_path / "first.trec"
    trec.write_text("q1 Q0 d4 1 2.0 x\nq1 Q0 d6 2 1.0 x\nq2 Q0 d3 1 1.0 x\n")
    out = tmp_path / "out"
    result = evaluated(out, "--dataset", str(beir()), "--methods", "fast,best", "--candidates", f"run:{trec}")
    for label in ("fast", "best"):
        run = read_trec(out / "runs" / f"{label}.trec")
        assert {q: sorted(r.documents) for q, r in run.items()} == {"q1": ["d4", "d6"], "q2": ["d3"]}
    assert result["candidates"]["recall@100"] == pytest.approx(1 / 4)
    assert result["rows"][0]["measures"]["R@100"] == pytest.approx(1 / 4)


def test_the_oracle_is_the_candidates_ceiling_and_no_more(beir: Callable[..., Path]) -> None:
    dataset = load_dataset(str(beir()))
    run = {"q1": ranked("d4", "d1"), "q3": ranked("d1", "d5")}
    best = measure_run(oracle(run, dataset), dataset.qrels, ["nDCG@10"])["nDCG@10"].tolist()
    assert best == pytest.approx([1.0, 0.0, 1 / (1 + 1 / np.log2(3)), 0.0])


def test_a_document_with_the_querys_id_is_dropped_only_on_request(beir: Callable[..., Path], tmp_path: Path) -> None:
    folder = str(beir(queries={"d1": QUERIES["q1"]}, qrels={"d1": {"d1": 1}}))
    kept = evaluated(tmp_path / "a", "--dataset", folder, "--methods", "fast")
    dropped = evaluated(tmp_path / "b", "--dataset", folder, "--methods", "fast", "--drop-identical-ids")
    assert kept["rows"][0]["measures"]["R@100"] == 1 and dropped["rows"][0]["measures"]["R@100"] == 0
    assert dropped["candidates"]["drop_identical_ids"] and dropped["candidates"]["documents_per_query"] == len(DOCUMENTS) - 1


def test_unjudged_documents_are_reported() -> None:
    run = {"q1": ranked("d1", "x", "d2", "y"), "q2": ranked("x")}
    assert unjudged_share(run, QRELS) == pytest.approx(3 / 5)
    assert measure_run(run, QRELS, ["Judged@10"])["Judged@10"].tolist()[:2] == pytest.approx([2 / 4, 0])


def test_truncation_is_reported_with_its_limit(beir: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["--dataset", str(beir()), "--methods", "fast,best"]
    whole = evaluated(tmp_path / "a", *arguments)
    cut = evaluated(tmp_path / "b", *arguments, "--max-tokens-per-doc", "9")
    assert [r["truncated_share"] for r in whole["rows"]] == [0, 0]
    assert 0 < cut["rows"][0]["truncated_share"] == cut["rows"][1]["truncated_share"] < 1
    assert cut["rows"][0]["token_limit"] == 9 and whole["rows"][0]["token_limit"] == 254


def test_overlap_of_train_and_test_is_warned_of(beir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    beir(split="train", qrels={"q1": {"d1": 1}, "q2": {"d6": 1}})
    result = evaluated(tmp_path / "out", "--dataset", str(beir()), "--methods", "fast")
    assert result["dataset"]["overlap"] == {"train": {"relevant_documents": 1, "query_texts": 2}}
    assert any("relevant in train too" in message for message in caplog.messages)


def test_scores_are_fp32_where_half_precision_would_tie() -> None:
    documents = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0002], [1.0, 0.0], [1.0, 0.0003]]), dim=-1)
    query = torch.tensor([[0.0, 1.0]]) + torch.tensor([[1.0, 0.0]])
    values, index = similarity_topk(query.half(), documents, 3)
    assert values.dtype == torch.float32 and index[0].tolist() == [2, 0, 1] and len(set(values[0].tolist())) == 3
    assert len(set((documents.half() @ query[0].half()).tolist())) < 3  # the naive code


def test_time_is_taken_warm_with_threads_and_cache_state_said(beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = Reranker.score
    monkeypatch.setattr(Reranker, "score", lambda self, query, texts, **kw: seen.append(query) or plain(self, query, texts, **kw))  # type: ignore[func-returns-value]
    result = evaluated(tmp_path / "out", "--dataset", str(beir()), "--methods", "fast", "--threads", "1")
    assert seen == [QUERIES["q1"], QUERIES["q2"], *QUERIES.values()], "two untimed queries first, then each once"
    assert result["environment"]["threads"] == torch.get_num_threads() == 1
    assert result["environment"]["vector_cache"] == "disk" and result["rows"][0]["cold_latency_ms"] is None


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    with Clock(torch.device("cuda")).phase("score"):
        pass
    with Clock(torch.device("cpu")).phase("score"):
        pass
    assert len(waits) == 2
