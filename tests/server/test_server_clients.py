"""The public clients of Cohere, Jina, Voyage and TEI, unmodified, against a real process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cohere
import numpy as np
import orjson
import pytest
import rerankers
import voyageai
from cohere.core.api_error import ApiError
from rerankers.documents import Document as RerankersDocument
from voyageai import error as voyage_error

from rerank_lab import Reranker
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.reranker import Ranking
from tests.conftest import DOCUMENTS
from tests.serving import ALIASES, KEY, STUCK, Server, eventually, serving

QUERY = "zeros of a polynomial"
TEXTS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()] + [
    "",
    "Return the roots of a polynomial.",
    "Return the roots of a polynomial.",
    "עברית 🙂 \x00",
]
MODELS = ["all-MiniLM-L6-v2", "minilm-cross", *ALIASES]
CLIENTS = ["cohere.ClientV2", "cohere.Client", "voyageai.Client"]
COHERE: dict[int, Any] = {
    401: cohere.UnauthorizedError, 404: cohere.NotFoundError, 413: ApiError, 422: cohere.UnprocessableEntityError, 429: cohere.TooManyRequestsError,
    500: cohere.InternalServerError, 503: cohere.ServiceUnavailableError, 504: cohere.GatewayTimeoutError,
}  # fmt: skip
VOYAGE: dict[int, Any] = {
    401: voyage_error.AuthenticationError, 404: voyage_error.APIError, 413: voyage_error.APIError, 422: voyage_error.MalformedRequestError,
    429: voyage_error.RateLimitError, 500: voyage_error.ServerError, 503: voyage_error.ServiceUnavailableError, 504: voyage_error.ServiceUnavailableError,
}  # fmt: skip
# How the rerankers package reaches the server: its name for the provider, and the provider's route.
MODES = [("cohere", "/v1/rerank"), ("jina", "/v1/rerank"), ("jina", "/rerank"), ("voyage", "/v1/rerank"), ("text-embeddings-inference", "/rerank")]
Local = Callable[[str], Ranking]


@pytest.fixture(scope="module")
def local() -> Local:
    """Id of a model → its ranking of TEXTS, made without a server."""
    made = {
        "all-MiniLM-L6-v2": Reranker("all-MiniLM-L6-v2", "fast", device="cpu").score(QUERY, TEXTS),
        "minilm-cross": Reranker(None, "standard", "minilm-cross", device="cpu").score(QUERY, TEXTS),
    }
    return lambda model: made[ALIASES.get(model, model)]


def ask(client: str, url: str, key: str = KEY, **more: Any) -> Any:
    """The result of the client's own method for TEXTS, without retries."""
    given = {"model": "all-MiniLM-L6-v2", "query": QUERY, "documents": TEXTS} | more
    if client == "voyageai.Client":
        return voyageai.Client(api_key=key, base_url=f"{url}/v1", max_retries=0).rerank(**given)
    kind = {"cohere.ClientV2": cohere.ClientV2, "cohere.Client": cohere.Client}[client]
    return kind(api_key=key, base_url=url, max_retries=0).rerank(**given)


def failure(client: str, url: str, key: str = KEY, **more: Any) -> tuple[type[Exception], int, Any, dict[str, str]]:
    """The client's exception: its type, status, detail and headers."""
    with pytest.raises((ApiError, voyage_error.VoyageError)) as caught:
        ask(client, url, key, **more)
    error: Any = caught.value
    if isinstance(error, ApiError):
        return type(error), error.status_code, error.body["detail"], error.headers
    return type(error), error.http_status, orjson.loads(error.http_body)["detail"], error.headers


def check(results: Sequence[Any], wanted: Ranking, top: int | None = None) -> None:
    """Asserts that order and scores are the same as Reranker's."""
    assert [r.index for r in results] == wanted.order[:top]
    assert [r.relevance_score for r in results] == pytest.approx(wanted.relevance.tolist()[:top], abs=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("client", "top"), [(client, "top_k" if "voyage" in client else "top_n") for client in CLIENTS])
def test_clients_get_the_ranking_of_reranker(server: Server, local: Local, client: str, top: str, model: str) -> None:
    for count in (None, 3, len(TEXTS) + 5):
        cut: dict[str, Any] = {} if count is None else {top: count}
        check(ask(client, server.url, model=model, **cut).results, local(model), count)


@pytest.mark.parametrize("model", ["all-MiniLM-L6-v2", "minilm-cross"])
def test_usage_is_the_tokens_that_were_read(server: Server, local: Local, model: str) -> None:
    for _ in range(2):  # first new, then cached
        assert ask("voyageai.Client", server.url, model=model).total_tokens == local(model).tokens > 100
        meta = ask("cohere.ClientV2", server.url, model=model).meta
        assert meta.tokens.input_tokens == local(model).tokens and meta.billed_units.search_units == 1 and meta.api_version.version == "2"
    first, second = ask("cohere.Client", server.url), ask("cohere.Client", server.url)
    assert first.meta.api_version.version == "1" and first.id and first.id != second.id


def test_cohere_cuts_documents_where_it_is_told_to(server: Server, encoder: BiEncoder) -> None:
    results = ask("cohere.ClientV2", server.url, max_tokens_per_doc=2).results
    check(results, Reranker(encoder, "fast", max_tokens_per_doc=2).score(QUERY, TEXTS))
    assert [r.index for r in results] != [r.index for r in ask("cohere.ClientV2", server.url).results]


def test_cohere_without_a_model_runs_the_servers_first(server: Server, local: Local) -> None:
    client = cohere.Client(api_key=KEY, base_url=server.url, max_retries=0)
    check(client.rerank(query=QUERY, documents=TEXTS).results, local("all-MiniLM-L6-v2"))


def test_cohere_gets_its_documents_back_whole(server: Server, local: Local) -> None:
    documents: list[Any] = [{"id": str(i), "text": text} if i % 2 else text for i, text in enumerate(TEXTS)]
    results = ask("cohere.Client", server.url, documents=documents, return_documents=True, top_n=7).results
    check(results, local("all-MiniLM-L6-v2"), 7)
    assert [r.document.text for r in results] == [TEXTS[r.index] for r in results]
    assert [getattr(r.document, "id", None) for r in results] == [str(r.index) if r.index % 2 else None for r in results]
    assert all(r.document is None for r in ask("cohere.Client", server.url, documents=documents, return_documents=False).results)


def test_voyage_puts_its_documents_beside_the_scores(server: Server) -> None:
    results = ask("voyageai.Client", server.url).results
    assert [r.document for r in results] == [TEXTS[r.index] for r in results] and len(results) == len(TEXTS)


@pytest.mark.parametrize("client", CLIENTS)
def test_one_document_and_the_empty_one(server: Server, client: str) -> None:
    for documents in ([""], ["a"], [" \n"]):
        (result,) = ask(client, server.url, documents=documents).results
        assert result.index == 0 and -1 <= result.relevance_score <= 1


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("status", "more", "message"),
    [
        (401, {"key": "wrong"}, "A known key is needed"),
        (404, {"model": "nobody"}, "minilm-cross"),
        (413, {"documents": ["x" * (33 << 20)]}, "33554432 bytes"),
        (422, {"query": " \n"}, ["query"]),
        (422, {"documents": []}, ["documents"]),
        (422, {"documents": ["a", {"title": "no text"}]}, ["documents", 1, "text"]),
    ],
    ids=["key", "model", "size", "query", "documents", "text"],
)
def test_errors_are_the_clients_own(server: Server, client: str, status: int, more: dict[str, Any], message: Any) -> None:
    kind, found, detail, headers = failure(client, server.url, **more)
    assert (kind, found) == ((VOYAGE if "voyage" in client else COHERE)[status], status) and headers["x-request-id"]
    assert message in detail if isinstance(message, str) else [error["loc"] for error in detail] == [["body", *message]]


@pytest.fixture(scope="module")
def stuck() -> Iterator[Server]:
    """A server that has room for one request, never answers it, and times out soon."""
    with serving("--max-queue-tokens", "1", "--timeout", "2.5", code=STUCK) as running:
        yield running


def test_errors_of_a_server_in_trouble_are_the_clients_own(stuck: Server) -> None:
    outcomes: dict[int, tuple[type[Exception], int, Any, dict[str, str]]] = {}

    def wait(client: str) -> threading.Thread:
        """Sends a request that is never answered, and returns when it fills the queue."""
        thread = threading.Thread(target=lambda: outcomes.update({504: failure(client, stuck.url)}))
        thread.start()
        eventually(lambda: stuck.metric("rerank_lab_queue_tokens") > 0)
        return thread

    def expect(client: str, status: int, message: str) -> dict[str, str]:
        kind, found, detail, headers = outcomes[status]
        assert (kind, found) == ((VOYAGE if "voyage" in client else COHERE)[status], status) and message in detail
        return headers

    for client in CLIENTS:
        waiting = wait(client)
        outcomes[429] = failure(client, stuck.url)
        waiting.join()
        assert int(expect(client, 429, "queue")["retry-after"]) >= 1
        expect(client, 504, "2.5 s")
        outcomes[500] = failure(client, stuck.url, query="dynamite")
        expect(client, 500, "all-MiniLM-L6-v2")
    waiting = wait(CLIENTS[0])
    stuck.process.send_signal(signal.SIGTERM)
    eventually(lambda: stuck.get("/ready")[0] == 503)
    for client in CLIENTS:
        outcomes[503] = failure(client, stuck.url)
        assert int(expect(client, 503, "draining")["retry-after"]) >= 1
    waiting.join()
    assert stuck.process.wait(20) == 0


def ranker(mode: str, url: str, model: str = "minilm-cross", key: str = KEY) -> Any:
    return rerankers.Reranker(model, model_type=mode, api_key=key, url=url, verbose=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("mode", "path"), MODES)
def test_rerankers_gets_the_ranking_of_reranker(server: Server, local: Local, mode: str, path: str, model: str) -> None:
    ids = [f"d{i}" for i in range(len(TEXTS))]
    ranked, wanted = ranker(mode, server.url + path, model).rank(QUERY, TEXTS, doc_ids=ids), local(model)
    assert [r.doc_id for r in ranked] == [ids[i] for i in wanted.order] and [r.text for r in ranked] == [TEXTS[i] for i in wanted.order]
    assert [r.score for r in ranked] == pytest.approx(wanted.relevance.tolist(), abs=1e-4)
    assert [r.doc_id for r in ranked.top_k(2)] == [ids[i] for i in wanted.order[:2]]


@pytest.mark.parametrize(("mode", "path"), MODES)
def test_rerankers_finds_scores_and_documents_where_it_looks(server: Server, local: Local, mode: str, path: str) -> None:
    asking, wanted = ranker(mode, server.url + path), local("minilm-cross")
    documents = [RerankersDocument(text, doc_id=i) for i, text in enumerate(TEXTS)]
    assert asking.score(QUERY, documents[4]) == pytest.approx(float(wanted.relevance[wanted.order.index(4)]), abs=1e-4)
    status, answer, _ = server.post(asking._format_payload(QUERY, documents).encode(), path)
    results = answer if mode == "text-embeddings-inference" else answer["data" if mode == "voyage" else "results"]
    assert status == 200 and [asking._get_document_text(result) for result in results] == [TEXTS[i] for i in wanted.order]


@pytest.mark.parametrize(("mode", "path"), MODES)
@pytest.mark.parametrize("more", [{"key": "wrong"}, {"model": "nobody"}, {"query": " "}], ids=["key", "model", "query"])
def test_rerankers_never_takes_an_error_for_a_ranking(server: Server, local: Local, mode: str, path: str, more: dict[str, str]) -> None:
    """rerankers does not check the status; it fails because the body of an error has no results."""
    if mode == "text-embeddings-inference" and "model" in more:  # TEI has no field for a model, so this is no error
        assert [r.score for r in ranker(mode, server.url + path, "nobody").rank(QUERY, TEXTS)] == pytest.approx(
            local("all-MiniLM-L6-v2").relevance.tolist(), abs=1e-4
        )
        return
    lacks = {"voyage": (KeyError, "data"), "text-embeddings-inference": (TypeError, "indices")}.get(mode, (KeyError, "results"))
    query = more.get("query", QUERY)
    with pytest.raises(lacks[0], match=lacks[1]):
        ranker(mode, server.url + path, **{name: value for name, value in more.items() if name != "query"}).rank(query, TEXTS)


@pytest.mark.parametrize("model", [None, *MODELS])
def test_tei_gets_raw_scores_and_texts_where_it_asks(server: Server, local: Local, model: str | None) -> None:
    body: dict[str, Any] = {"query": QUERY, "texts": TEXTS, "truncate": True} | ({} if model is None else {"model": model})
    wanted = local(model or "all-MiniLM-L6-v2")
    status, plain, _ = server.post(body, "/rerank")
    raw, echoed = (server.post(body | more, "/rerank")[1] for more in ({"raw_scores": True}, {"return_text": True}))
    assert status == 200 and all(answer.keys() == {"index", "score"} for answer in plain)
    assert [r["index"] for r in plain] == [r["index"] for r in raw] == wanted.order
    np.testing.assert_allclose([r["score"] for r in raw], wanted.scores, atol=1e-4)
    np.testing.assert_allclose([r["score"] for r in plain], wanted.relevance, atol=1e-4)
    assert echoed == [r | {"text": TEXTS[r["index"]]} for r in plain]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_what_the_routes_share(server: Server, path: str) -> None:
    body: dict[str, Any] = {"query": QUERY, "documents": [{"text": "a", "list": [{"x": None}]}, "b"]}

    def results(**more: Any) -> Any:
        return server.post(body | more, path)[1]["results"]

    assert [len(results(**more)) for more in ({"top_n": 1, "top_k": 2}, {"top_k": 1}, {"top_n": None, "top_k": None})] == [1, 1, 2]
    assert {r["index"]: r["document"] for r in results(return_documents=True)} == {0: body["documents"][0], 1: {"text": "b"}}
    assert all("document" not in r for more in ({}, {"return_documents": None}, {"return_documents": False}) for r in results(**more))
    deep = b'{"query":"q","documents":["b",{"text":"a","x":' + b"[" * 500 + b"]" * 500 + b'}],"return_documents":true}'
    assert server.post(deep, path)[:2] == (
        422,
        {"detail": [{"loc": ["body"], "msg": "Input should be nested at most 254 deep", "type": "recursion_loop"}]},
    )
    assert server.post({"query": QUERY, "documents": ["a"], "model": "nobody"}, path)[0] == 404


def test_rerank_tells_its_two_clients_apart(server: Server) -> None:
    jina = server.post({"query": QUERY, "documents": ["a"], "return_documents": True}, "/rerank")[1]
    assert jina["object"] == "list" and jina["model"] == "all-MiniLM-L6-v2" and jina["usage"]["total_tokens"] == jina["usage"]["prompt_tokens"] > 0
    assert jina["results"] == [{**jina["data"][0], "document": {"text": "a"}}] and jina["data"][0]["document"] == "a"
    assert isinstance(server.post({"query": QUERY, "texts": ["a"], "documents": ["b", "c"]}, "/rerank")[1], list)
    neither = {"detail": [{"loc": ["body", "texts"], "msg": "Field required, or documents", "type": "missing"}]}
    assert server.post({"query": QUERY}, "/rerank")[:2] == (422, neither)
    assert server.post([QUERY], "/rerank")[:2] == server.post([QUERY], "/v1/rerank")[:2]


FIELDS: list[dict[str, str]] = [{"id": str(i), "title": title, "body": text, "text": "nothing of it"} for i, (title, text) in enumerate(DOCUMENTS.values())]


@pytest.mark.parametrize("names", [["title", "body"], ["body", "title"], ["body"], ["text"]])
def test_cohere_reads_the_fields_that_it_names_in_their_order(server: Server, encoder: BiEncoder, names: list[str]) -> None:
    results = ask("cohere.Client", server.url, documents=[*FIELDS, TEXTS[0]], rank_fields=names, return_documents=True).results
    check(results, Reranker(encoder, "fast").score(QUERY, ["\n".join(document[name] for name in names) for document in FIELDS] + [TEXTS[0]]))
    echoed = {r.index: r.document.model_dump(exclude_unset=True) for r in results}
    assert echoed == {**dict(enumerate(FIELDS)), len(FIELDS): {"text": TEXTS[0]}}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_fields_that_are_not_there_are_never_passed_over(server: Server, path: str) -> None:
    body: dict[str, Any] = {"query": QUERY, "documents": ["a", {"title": "b", "year": 1999, "none": None}]}

    def error(*names: str) -> dict[str, Any]:
        status, answer, _ = server.post(body | {"rank_fields": names}, path)
        assert status == 422 and len(answer["detail"]) == 1
        return dict(answer["detail"][0])

    where = {"loc": ["body", "documents", 1], "msg": "Input should have a string under the name that rank_fields[1] gives"}
    assert [error("title", name) for name in ("titel", "year", "none")] == [where | {"type": kind} for kind in ("missing", "string_type", "string_type")]
    assert error("title", "title") == {"loc": ["body", "rank_fields"], "msg": "List should name each field once", "type": "repeated"}
    assert server.post(body | {"rank_fields": ["title"]}, path)[0] == 200
    plain = server.post(body, path)[:2]
    assert plain[1]["detail"][0]["loc"] == ["body", "documents", 1, "text"]
    assert server.post(body | {"rank_fields": None}, path)[:2] == server.post(body | {"rank_fields": []}, path)[:2] == plain


@pytest.mark.parametrize("model", ["nobody", "", 3, {"id": "nobody"}])
def test_tei_has_no_model_to_be_wrong_about(server: Server, model: Any) -> None:
    body: dict[str, Any] = {"query": QUERY, "texts": TEXTS}
    assert server.post(body | {"model": model}, "/rerank")[:2] == server.post(body, "/rerank")[:2]
    assert server.post({"query": QUERY, "documents": TEXTS, "model": "nobody"}, "/rerank")[0] == 404, "Jina has one"


LONG = "word " * 600
WHOLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("/v1/rerank", {"truncation": False}, {"truncation": True}),
    ("/v1/rerank", {"max_chunks_per_doc": 10}, {"max_chunks_per_doc": 1}),
    ("/rerank", {"truncate": False}, {"truncate": True}),
    ("/rerank", {"truncation_direction": "Left", "truncate": True}, {"truncation_direction": "Right", "truncate": True}),
    ("/rerank", {"truncation_direction": "left"}, {"truncation_direction": "right"}),
]


@pytest.mark.parametrize("model", ["all-MiniLM-L6-v2", "minilm-cross", "classifier"])
@pytest.mark.parametrize(("path", "refuses", "allows"), WHOLE, ids=[next(iter(refuses)) + str(n) for n, (_, refuses, _) in enumerate(WHOLE)])
def test_long_texts_are_not_cut_where_the_client_rules_it_out(
    server: Server, small_cross: Path, path: str, refuses: dict[str, Any], allows: dict[str, Any], model: str
) -> None:
    name = "texts" if any("trunc" in key and key != "truncation" for key in refuses) else "documents"
    base = {"model": str(small_cross) if model == "classifier" else model, "query": QUERY, name: ["a", "b"]}
    plain = server.post(base, path)[1]
    for body in (base | {name: ["a", LONG]}, base | {"query": LONG}):
        status, answer, _ = server.post(body | refuses, path)
        (error,) = answer["detail"]
        assert (status, error["loc"], error["type"]) == (422, ["body", next(iter(refuses))], "too_long_to_read_whole") and "tokens" in error["msg"]
        assert server.post(body | allows, path)[0] == server.post(body, path)[0] == 200
    scored = server.post(base | refuses, path)[1]
    assert (scored if path == "/rerank" else scored["results"]) == (plain if path == "/rerank" else plain["results"]), "short ones are scored as ever"


def test_jinas_name_for_the_tokens_of_a_document(server: Server) -> None:
    body = {"query": QUERY, "documents": TEXTS}
    cut, same = (server.post(body | {name: 2}, "/v1/rerank")[1]["results"] for name in ("max_doc_length", "max_tokens_per_doc"))
    assert cut == same != server.post(body, "/v1/rerank")[1]["results"]
    assert server.post(body | {"max_doc_length": 1, "max_tokens_per_doc": 2}, "/v1/rerank")[1]["results"] == same


@pytest.mark.parametrize("client", CLIENTS)
def test_a_slash_behind_the_address_is_no_other_address(server: Server, local: Local, client: str) -> None:
    check(ask(client, f"{server.url}/").results, local("all-MiniLM-L6-v2"))


@pytest.mark.parametrize(("mode", "path"), MODES)
def test_nor_is_one_behind_a_route(server: Server, local: Local, mode: str, path: str) -> None:
    ranked = ranker(mode, f"{server.url}/{path}/").rank(QUERY, TEXTS)
    assert [r.text for r in ranked] == [TEXTS[i] for i in local("minilm-cross").order]
