"""A scorer in one file, registered only by this test, works everywhere: rank, evaluation, server and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rerank_kernels import reference
from rerank_lab import Reranker
from rerank_lab.eval.__main__ import main
from rerank_lab.models.base import Detail, Scorer
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.kinds import SCORERS, needs_of
from rerank_lab.server.fleet import Fleet
from rerank_lab.server.steps import Steps
from tests.conftest import ROOT, report_of
from tests.methods.test_methods import QUERY, TEXTS, raw_scores, z
from tests.serving import Server, serving
from tests.toys.late import KIND as LATE
from tests.toys.scorer import KIND, Overlap

V3 = "/api/v3/inference/reranker"
REGISTERED = f"""
import sys
sys.path.append({str(ROOT)!r})
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.kinds import SCORERS, needs_of
from tests.toys.scorer import KIND
SCORERS["overlap"] = KIND
"""
SHARES = [len({*QUERY.lower().split()} & {*text.lower().split()[:64]}) / len({*QUERY.lower().split()}) for text in TEXTS]
LOGITS = [4 * share - 2 for share in SHARES]


@pytest.fixture(autouse=True)
def overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "overlap", KIND)


@pytest.fixture(scope="module")
def serves() -> Iterator[Server]:
    with serving("--model-cross", "overlap", code=REGISTERED) as running:
        yield running


def test_it_is_a_scorer_and_ranks_alone_and_in_company(reranker: Reranker) -> None:
    assert isinstance(Overlap(), Scorer)
    alone = Reranker(None, "standard", "overlap", device="cpu")
    assert raw_scores(alone).tolist() == pytest.approx(LOGITS)
    ranking = alone.score(QUERY, [*TEXTS, "join " * 65])
    assert (
        ranking.truncated == 2
        and ranking.flops.seen == 0
        and ranking.tokens == sum(len({*QUERY.split()}) + min(64, len(t.split())) for t in [*TEXTS, "join " * 65])
    )
    assert raw_scores(Reranker(method="optimal", model_cross="overlap", device="cpu")) == pytest.approx(z(np.array(LOGITS)), abs=1e-5)


def test_it_is_evaluated_and_reported(beir: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--dataset", str(beir()), "--model-cross", "overlap", "--top-k", "4", "--cold-queries", "1", "--out", str(out)]) == 0
    result = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert [*rows] == ["fast", "standard", "optimal", "best", "best+cross", "maxsim"]
    assert rows["standard"]["model_cross"] == "overlap" and rows["standard"]["token_limit"] == 64 and rows["standard"]["flops_per_query"] == 0
    assert result["models"]["model_cross_files"] == Overlap.fingerprint
    assert "| standard |" in report_of(out)


def test_it_is_served(serves: Server) -> None:
    fields = {"model": "all-MiniLM-L6-v2", "model_cross": "overlap", "query": QUERY, "documents": TEXTS}
    status, answer, _ = serves.post(fields | {"method": "standard"})
    assert status == 200 and answer["meta"]["model_cross"] == "overlap"
    shown = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert [shown[i] for i in range(len(TEXTS))] == pytest.approx(torch.tensor(LOGITS).double().sigmoid().tolist(), abs=1e-6)
    best = serves.post(fields | {"method": "best"})[1]["results"]
    wanted = Reranker(method="best", model_cross="overlap", device="cpu").rank(QUERY, TEXTS)
    assert [result["index"] for result in best] == [result.index for result in wanted]
    schema = serves.get("/openapi.json")[1]["paths"][V3]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "overlap" in json.dumps(schema)
    assert {"id": "overlap", "role": "cross-encoder", "score_scale": "sigmoid of the logit, 0 to 1", "token_limit": 64, "dimensions": 1} in serves.get(
        "/api/v3/models"
    )[1]["models"]


def test_a_fleet_holds_it_beside_others() -> None:
    fleet = Fleet.load(["all-MiniLM-L6-v2"], ["overlap", "minilm-cross"], device="cpu")
    assert len(fleet.caches) == 1 and fleet.reranker("standard", None, "overlap").rank(QUERY, TEXTS)[0].relevance_score == pytest.approx(
        max(torch.tensor(LOGITS).sigmoid().tolist())
    )


def test_a_scorer_that_needs_token_vectors_gets_them_wherever_it_runs(monkeypatch: pytest.MonkeyPatch, encoder: BiEncoder) -> None:
    monkeypatch.setitem(SCORERS, "late", LATE)
    assert needs_of("late") == ("all-MiniLM-L6-v2", Detail.TOKENS)
    query, documents = encoder.encode([QUERY], kind="query"), encoder.encode(TEXTS)
    pairs = torch.tensor([[0, n] for n in range(len(TEXTS))])
    wanted = reference.subspace_attention(query.tokens.float(), query.offsets, documents.tokens.float(), documents.offsets, pairs, 0.0)
    expected = wanted.view(len(TEXTS), -1).mean(1).double().numpy()
    alone = Reranker(None, "standard", "late", device="cpu")
    assert raw_scores(alone) == pytest.approx(expected, abs=1e-3)
    fleet = Fleet.load(["all-MiniLM-L6-v2"], ["late"], device="cpu")
    assert len(fleet.caches) == 1
    for method, model in (("standard", None), ("optimal", "all-MiniLM-L6-v2"), ("best", "all-MiniLM-L6-v2")):
        reranker = fleet.reranker(method, model, "late")
        steps = Steps(reranker, QUERY, TEXTS)
        while (ranking := steps.advance()) is None:
            for unit in list(steps.units):
                unit.run([unit])
        direct = reranker.without_cache().score(QUERY, TEXTS)
        assert ranking.order == direct.order and ranking.tokens == direct.tokens
        torch.testing.assert_close(ranking.scores, direct.scores, atol=1e-4, rtol=0)
