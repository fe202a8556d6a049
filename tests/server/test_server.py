"""The v3 contract, case by case, on a real server process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import orjson
import pytest

from rerank_lab import Reranker
from rerank_lab.server.__main__ import known_roles, main
from tests.conftest import DOCUMENTS
from tests.serving import Server

TEXTS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
BASE: dict[str, Any] = {"model": "all-MiniLM-L6-v2", "query": "zeros of a polynomial", "documents": TEXTS}
CROSS = {"model_cross": "minilm-cross"}
# The examples of the upstream page.
FAST = {
    "model": "bge-reranker-v2-m3",
    "query": "What is machine learning?",
    "documents": [
        "Machine learning is a subset of artificial intelligence that enables computers to learn from data.",
        "Python is a popular programming language for web development.",
        "Deep learning uses neural networks with multiple layers.",
        "The weather today is sunny and warm.",
        "Supervised learning requires labeled training data.",
    ],
    "method": "fast",
    "top_n": 3,
}
HYBRID: dict[str, Any] = {
    "model": "bge-reranker-v2-m3",
    "model_cross": "bge-reranker-cross-encoder",
    "query": "How do neural networks work?",
    "documents": [
        "Neural networks are computing systems inspired by biological neural networks.",
        "The stock market is volatile today.",
        "Backpropagation is used to train neural networks.",
    ],
    "method": "optimal",
    "stage1_top_k": 100,
    "top_n": 2,
}


def test_the_upstream_pages_requests_are_answered_as_they_stand(server: Server) -> None:
    status, answer, _ = server.post(FAST, **{"X-Provider": "anyone"})
    assert status == 200 and answer["meta"] == {"method": "fast", "deployed_model_id": "bge-reranker-v2-m3"}
    assert len(answer["results"]) == 3 and answer["results"][0]["index"] == 0
    assert all(result.keys() == {"index", "relevance_score"} for result in answer["results"])
    status, answer, _ = server.post(HYBRID)
    assert status == 200 and [result["index"] for result in answer["results"]] == [0, 2]
    assert answer["meta"] == {
        "method": "optimal", "deployed_model_id": "bge-reranker-v2-m3", "model_cross": "bge-reranker-cross-encoder", "stage1_top_k": 100,
    }  # fmt: skip
    assert server.post(HYBRID | {"return_documents": True})[1]["results"][0]["document"] == HYBRID["documents"][0]


@pytest.mark.parametrize("cross", ["minilm-cross", "classifier"])
@pytest.mark.parametrize("method", ["fast", "standard", "optimal", "best", "best+cross", "maxsim"])
def test_answers_are_those_of_reranker(server: Server, small_cross: Path, method: str, cross: str) -> None:
    model_cross = str(small_cross) if cross == "classifier" else cross
    name, _, joined = method.partition("+")
    uses = bool(joined) or name in ("standard", "optimal")
    settings = {"stage1_top_k": 3} if name in ("optimal", "best", "maxsim") else {}
    spec = ":".join([name, *(f"{key}={value}" for key, value in settings.items())])
    status, answer, _ = server.post(BASE | settings | {"method": name} | ({"model_cross": model_cross} if uses else {}))
    wanted = Reranker("all-MiniLM-L6-v2", spec, model_cross if uses else None, device="cpu").rank(BASE["query"], TEXTS)
    assert status == 200 and [r["index"] for r in answer["results"]] == [r.index for r in wanted]
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx([r.relevance_score for r in wanted], abs=1e-5)
    assert answer["meta"] == {"method": name, "deployed_model_id": BASE["model"]} | ({"model_cross": model_cross} if uses else {}) | settings


@pytest.mark.parametrize("method", ["fast", "standard", "optimal", "best", "maxsim"])
def test_odd_documents_are_scored_and_echoed_as_sent(server: Server, method: str) -> None:
    documents: list[Any] = ["", "  \n", "a", "a", {"text": "a", "id": [1, {"x": None}]}, {"text": ""}, "long " * 200_000, "\u202eעברית 🙂 \x00"]
    status, answer, _ = server.post(BASE | CROSS | {"documents": documents, "method": method, "return_documents": True})
    assert status == 200 and sorted(r["index"] for r in answer["results"]) == list(range(len(documents)))
    assert all(r["document"] == documents[r["index"]] and math.isfinite(r["relevance_score"]) for r in answer["results"])
    score = {r["index"]: r["relevance_score"] for r in answer["results"]}
    assert score[2] == score[3] == score[4] and score[0] == score[5]
    assert answer["results"] == sorted(answer["results"], key=lambda r: (-r["relevance_score"], r["index"]))


def test_cutting_down(server: Server) -> None:
    def count(**more: Any) -> int:
        return len(server.post(BASE | CROSS | more)[1]["results"])

    assert [count(top_n=n) for n in (1, 6, 1000, None)] == [1, 6, 6, 6]
    assert count(method="optimal", stage1_top_k=2) == count(method="best", stage1_top_k=2, top_n=9) == 2
    assert count(method="optimal", stage1_top_k=4, top_n=3) == 3 and count(method="fast", stage1_top_k=2) == 6
    long = BASE | {"documents": ["roots " + "filler " * 50, "roots"]}
    cut = server.post(long | {"max_tokens_per_doc": 1})[1]["results"]
    assert cut[0]["relevance_score"] == cut[1]["relevance_score"] != server.post(long)[1]["results"][1]["relevance_score"]


def test_model_cross_is_ignored_by_fast_and_optional_for_best(server: Server) -> None:
    status, answer, _ = server.post(BASE | {"model_cross": "whatever"})
    assert status == 200 and answer["meta"] == {"method": "fast", "deployed_model_id": "all-MiniLM-L6-v2"}
    alone, joined = (server.post(BASE | {"method": "best", "model_cross": cross})[1] for cross in (None, "minilm-cross"))
    assert "model_cross" not in alone["meta"] and joined["meta"]["model_cross"] == "minilm-cross" and joined["results"] != alone["results"]
    assert server.post(BASE | CROSS | {"method": "standard", "model": "minilm-cross"})[0] == 200, "for standard, model is only looked up"


DEEP = (b"", b',"return_documents":true')
BAD: list[tuple[Any, list[Any], str]] = [
    (BASE | {"documents": []}, ["documents"], "too_short"),
    (BASE | {"documents": ["a"] * 1001}, ["documents"], "too_long"),
    (BASE | {"query": " \t\n"}, ["query"], "blank"),
    (BASE | {"documents": ["a", {"id": 3}]}, ["documents", 1, "text"], "missing"),
    (BASE | {"documents": ["a", {"text": 3}]}, ["documents", 1, "text"], "string_type"),
    (BASE | {"documents": [None]}, ["documents", 0], "document_type"),
    (BASE | {"documents": "a"}, ["documents"], "list_type"),
    *((BASE | {field: value}, [field], "int_type") for field in ("top_n", "stage1_top_k", "max_tokens_per_doc", "batch_size") for value in ("3", True, 1.0)),
    *((BASE | {field: 0}, [field], "greater_than_equal") for field in ("top_n", "stage1_top_k", "max_tokens_per_doc", "batch_size")),
    (BASE | {"stage1_top_k": None}, ["stage1_top_k"], "int_type"),
    (BASE | {"return_documents": 1}, ["return_documents"], "bool_type"),
    (BASE | {"method": "fastest"}, ["method"], "literal_error"),
    (BASE | {"model": None}, ["model"], "string_type"),
    ({k: v for k, v in BASE.items() if k != "query"}, ["query"], "missing"),
    (BASE | {"method": "standard"}, ["model_cross"], "missing"),
    (BASE | {"method": "optimal", "model_cross": None}, ["model_cross"], "missing"),
    (BASE | {"method": "standard", "model_cross": "all-MiniLM-L6-v2"}, ["model_cross"], "wrong_role"),
    (BASE | {"method": "best", "model_cross": "bge-reranker-v2-m3"}, ["model_cross"], "wrong_role"),
    *((BASE | CROSS | {"method": method, "model": "minilm-cross"}, ["model"], "wrong_role") for method in ("fast", "optimal", "best")),
    *((body, [], "json_invalid") for body in (b"", b"{", b'{"query": "\xff"}', b'"\\ud800"', b"NaN", b'{"a": 1e400}', b"[" * 100_000, b"{} {}")),
    ([BASE], [], "model_type"),
    (b'"text"', [], "model_type"),
    *((b'{"model":"m","query":"q","documents":[{"text":"a","x":' + b"[" * 500 + b"]" * 500 + b"}]" + more + b"}", [], "recursion_loop") for more in DEEP),
    (b'{"model":"m","query":"q","documents":["a"],"x":[' + b"[]," * (1 << 20) + b"1]}", [], "too_many_parts"),
    (b'{"model":"m","query":"q","documents":["a"],"x":{' + b",".join(b'"%d":1' % n for n in range(1 << 20)) + b"}}", [], "too_many_parts"),
]


@pytest.mark.parametrize(("body", "place", "kind"), BAD, ids=[f"{n}-{kind}" for n, (_, _, kind) in enumerate(BAD)])
def test_what_breaks_the_schema_is_told_where_and_never_what(server: Server, body: Any, place: list[Any], kind: str) -> None:
    status, answer, headers = server.post(body)
    assert status == 422 and answer.keys() == {"detail"} and headers["x-request-id"]
    assert [error for error in answer["detail"] if error["loc"] == ["body", *place] and error["type"] == kind], answer
    assert all(error.keys() == {"loc", "msg", "type"} and "polynomial" not in error["msg"] for error in answer["detail"])


def test_the_limit_of_documents_is_in_the_message(server: Server) -> None:
    assert "1000" in server.post(BASE | {"documents": ["a"] * 1001})[1]["detail"][0]["msg"]


@pytest.mark.parametrize(
    "more", [{"model": "nobody"}, CROSS | {"model_cross": "nobody", "method": "best"}, {"model": "minilm-cross", "model_cross": "x", "method": "best"}]
)
def test_unknown_ids_are_404_with_the_known_ones(server: Server, more: dict[str, Any]) -> None:
    status, answer, _ = server.post(BASE | more)
    assert status == 404 and all(name in answer["detail"] for name in ("all-MiniLM-L6-v2", "minilm-cross", "bge-reranker-v2-m3"))


def test_the_order_of_checks(server: Server) -> None:
    large = orjson.dumps("x" * (33 << 20))
    assert server.post(b"{", key="wrong")[0] == 401 and server.post({"model": "nobody"})[0] == 422
    assert server.post(BASE | {"model": "nobody", "model_cross": "all-MiniLM-L6-v2", "method": "standard"})[0] == 404
    assert server.post(large, key="wrong")[0] == 401 and server.post(large)[0] == 413


@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic a-key-for-tests", "a-key-for-tests", "Bearer a-key-for-tests x", "Bearer \xff"]
)
@pytest.mark.parametrize("path", ["/api/v3/inference/reranker", "/v1/rerank", "/v2/rerank", "/rerank"])
def test_no_key_no_answer(server: Server, path: str, authorization: str | None) -> None:
    status, answer, headers = server.post(BASE, path, None, **({} if authorization is None else {"Authorization": authorization}))
    assert status == 401 and headers["www-authenticate"] == "Bearer" and list(answer) == ["detail"]


def test_every_answer_carries_a_request_id(server: Server) -> None:
    assert server.post(BASE, **{"X-Request-ID": "mine-7"})[2]["x-request-id"] == "mine-7"
    ids = {server.get(path)[2]["x-request-id"] for path in ("/health", "/nowhere", "/metrics", "/")} | {server.post(b"{", key=None)[2]["x-request-id"]}
    assert len(ids) == 5 and all(ids)
    assert len(server.post(BASE, **{"X-Request-ID": "x" * 500})[2]["x-request-id"]) == 32, "one that is no id gets another"


def test_the_routes_beside_it(server: Server) -> None:
    assert server.get("/health")[:2] == (200, {"status": "ok"}) and server.get("/ready")[:2] == (200, {"status": "ready"})
    models = {m["id"]: m for m in server.get("/api/v3/models")[1]["models"]}
    assert models["all-MiniLM-L6-v2"] == {
        "id": "all-MiniLM-L6-v2", "role": "bi-encoder", "score_scale": "cosine, -1 to 1", "token_limit": 254, "dimensions": 384, "token_dimensions": 128,
    }  # fmt: skip
    assert models["minilm-cross"]["role"] == "cross-encoder" and models["bge-reranker-v2-m3"]["alias_of"] == "all-MiniLM-L6-v2"
    assert server.get("/nowhere")[:2] == (404, {"detail": "Not Found"}) and server.get("/api/v3/inference/reranker")[0] == 405
    assert "swagger" in server.get("/docs")[1].lower()


def test_what_is_counted(server: Server) -> None:
    def counts() -> list[float]:
        names = ['rerank_lab_documents_total{cache="hit"}', 'rerank_lab_documents_total{cache="miss"}', "rerank_lab_batch_tokens_count"]
        route = '{route="/api/v3/inference/reranker",status="200"}'
        return [server.metric(name) for name in [*names, f"rerank_lab_requests_total{route}"]]

    body = BASE | {"documents": ["counted once", "counted twice", "counted once"]}
    server.post(body)
    before = counts()
    server.post(body)
    assert [b - a for a, b in zip(before, counts())] == [2, 0, 1, 1]
    assert server.metric("rerank_lab_queue_tokens") == server.metric("rerank_lab_requests_in_flight") == 0
    assert 0 <= server.metric("rerank_lab_padding_share") < 1 and server.metric("rerank_lab_cache_bytes") > 0


def test_logs_hold_neither_keys_nor_texts(server: Server) -> None:
    server.post(BASE | {"query": "unheard-of-secret", "documents": ["unheard-of-secret"]}, **{"X-Request-ID": "logged-1"})
    server.post(BASE, key="unheard-of-secret")
    log = server.log.read_text()
    assert "200" in next(line for line in log.splitlines() if "logged-1" in line)
    assert "unheard-of-secret" not in log and "a-key-for-tests" not in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-auth", "--host", "0.0.0.0"], "loopback"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt"),
        (["--alias", "x"], "NAME=ID"),
        (["--alias", "x=nobody"], "'nobody' is no known id"),
        (["--alias", "minilm-cross=all-MiniLM-L6-v2"], "taken"),
        (["--model", "a", "--model-cross", "a"], "one role"),
        (["--model", "minilm-cross"], "is a cross-encoder"),
    ],
)
def test_wrong_set_ups_are_refused_before_anything_is_loaded(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2 and message in capsys.readouterr().err


def test_key_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    for content, message in (("# nothing\n\n", "holds no key"), ("good\nnot good\n", "key 2 holds")):
        file.write_text(content)
        assert main(["--api-key-file", str(file)]) == 2 and message in capsys.readouterr().err


def test_ids_that_are_known() -> None:
    assert known_roles([], []) == {"all-MiniLM-L6-v2": "bi-encoder", "minilm-cross": "cross-encoder"}
    assert list(known_roles(["mine"], ["other"])) == ["mine", "other", "all-MiniLM-L6-v2", "minilm-cross"]
