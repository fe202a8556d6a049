"""A late-interaction model on the endpoint: its place among the models, the methods that it has, and what other services' clients get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rerank_lab import Reranker
from tests.conftest import DOCUMENTS
from tests.models.checkpoints import late_interaction
from tests.serving import Server, serving

QUERY, TEXTS = "zeros of a polynomial", [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return late_interaction(tmp_path_factory.mktemp("late") / "colbert")


@pytest.fixture(scope="module")
def late(colbert: Path) -> Iterator[Server]:
    with serving("--model", str(colbert), "--alias", f"colbert={colbert}") as server:
        yield server


def test_models_tell_its_scale(late: Server, colbert: Path) -> None:
    found = {one["id"]: one for one in late.get("/api/v3/models")[1]["models"]}
    assert found[str(colbert)] == {
        "id": str(colbert), "role": "bi-encoder", "token_limit": 37, "dimensions": 0, "token_dimensions": 16,
        "score_scale": "maxsim, the sum of the query's tokens' largest cosines: at most their number",
    }  # fmt: skip
    assert found["colbert"]["alias_of"] == str(colbert) and found["all-MiniLM-L6-v2"]["score_scale"] == "cosine, -1 to 1"


@pytest.mark.parametrize(("method", "cross"), [("maxsim", None), ("best", None), ("best", "minilm-cross"), ("optimal", "minilm-cross")])
def test_answers_are_those_of_reranker(late: Server, colbert: Path, method: str, cross: str | None) -> None:
    body: dict[str, Any] = {"model": "colbert", "query": QUERY, "documents": TEXTS, "method": method, "stage1_top_k": 4}
    status, answer, _ = late.post(body | ({"model_cross": cross} if cross else {}))
    wanted = Reranker(str(colbert), f"{method}:stage1_top_k=4", cross, device="cpu").rank(QUERY, TEXTS)
    assert status == 200 and [r["index"] for r in answer["results"]] == [r.index for r in wanted]
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx([r.relevance_score for r in wanted], abs=1e-4)


def test_fast_is_refused_with_the_reason_and_the_methods_that_work(late: Server) -> None:
    for body in ({"method": "fast"}, {}):
        status, answer, _ = late.post({"model": "colbert", "query": QUERY, "documents": TEXTS} | body)
        assert status == 422 and answer["detail"] == [
            {
                "loc": ["body", "method"], "type": "wrong_method",
                "msg": "Input should be standard, optimal, best or maxsim for this model: method fast compares vectors of whole texts, "
                "and it has a vector for each token alone (late interaction)",
            }
        ]  # fmt: skip


def test_clients_of_other_services_get_maxsim(late: Server, colbert: Path) -> None:
    wanted = Reranker(str(colbert), "maxsim", device="cpu").rank(QUERY, TEXTS)
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        status, answer, _ = late.post({"query": QUERY, "documents": TEXTS}, path)
        assert status == 200 and [r["index"] for r in answer["results"]] == [r.index for r in wanted]
    scores = {one["index"]: one["score"] for one in late.post({"query": QUERY, "texts": TEXTS}, "/rerank")[1]}
    assert scores == pytest.approx({r.index: r.relevance_score for r in wanted}, abs=1e-4)


def test_a_text_past_the_limit_of_its_side_is_told_where_none_may_be_cut(late: Server) -> None:
    body = {"query": QUERY, "documents": TEXTS, "truncation": False}
    assert late.post(body, "/v1/rerank")[0] == 200
    for long in ({"query": "roots " * 14}, {"documents": ["roots " * 38]}):
        status, answer, _ = late.post(body | long, "/v1/rerank")
        assert status == 422 and answer["detail"][0]["type"] == "too_long_to_read_whole"
    assert late.post(body | {"query": "roots " * 13, "documents": ["roots " * 37]}, "/v1/rerank")[0] == 200
