"""The OpenAPI document, compared with the server that it describes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from rerank_lab.server.openapi import NOT_BLANK, ServerContract
from rerank_lab.server.service import ServerSettings, Service
from tests.serving import ALIASES, KEY, STUCK, Server, eventually, serving

V3 = "/api/v3/inference/reranker"
CLIENTS = ["/v1/rerank", "/v2/rerank", "/rerank"]
# Route → the errors that the contract names.
ERRORS = {path: {"400", "401", "404", "413", "415", "422", "429", "500", "503", "504"} for path in (V3, *CLIENTS)}
ERRORS |= {"/health": set(), "/ready": {"503"}, "/metrics": set(), "/api/v3/models": {"503"}}
BI, CROSS = ["all-MiniLM-L6-v2", "bge-reranker-v2-m3"], ["minilm-cross", "bge-reranker-cross-encoder"]
BASE: dict[str, Any] = {"model": BI[0], "query": "q", "documents": ["a", ""]}
CONFIG = """
hooks = "hooks.py"
[cache]
enabled = false
[warnings]
fail-on = true
[checks.positive_data_acceptance]
expected-statuses = [200] # the ids stand in the schema: nothing that it allows is a 404
[checks.negative_data_rejection]
expected-statuses = [404, 422]
# What a phase draws depends only on the seed, not on earlier answers.
[phases.fuzzing.error-feedback]
enabled = false
[phases.fuzzing.extra-data-sources]
responses = false
[phases.coverage.extra-data-sources]
responses = false
"""
# Requests that are not sent, because JSON Schema cannot describe them: it takes 1.0 for an integer, and the contract does not;
# and no keyword says that objects hold strings under the names that another field gives.
HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    return {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in body.items()}

@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body if isinstance(case.body, dict) else {}
    names, documents = body.get("rank_fields"), body.get("documents")
    if isinstance(names, list) and isinstance(documents, list) and all(isinstance(name, str) for name in names):
        lacks = lambda document: {name: "" for name in names if not isinstance(document.get(name), str)}
        case.body = body | {"documents": [document | lacks(document) if isinstance(document, dict) else document for document in documents]}
"""


@pytest.fixture(scope="module")
def limited() -> Iterator[Server]:
    """A server with the same ids on every machine, so that the same requests are drawn from its schema."""
    names = [flag for alias, target in ALIASES.items() for flag in ("--alias", f"{alias}={target}")]
    with serving("--max-documents", "30", *names) as running:
        yield running


@pytest.fixture(scope="module")
def document(limited: Server) -> Any:
    return limited.get("/openapi.json")[1]


def request_schema(document: Any, path: str) -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def conforms(document: Any, path: str, outcome: tuple[int, Any, dict[str, str]], method: str = "post") -> int:
    """Asserts that an answer's body and headers are as the document declares for its status. Returns the status."""
    status, body, headers = outcome
    declared = document["paths"][path][method]["responses"][str(status)]
    for kind, content in declared["content"].items():
        assert headers["content-type"].partition(";")[0] == kind
        jsonschema_rs.validate(content["schema"], body)
    assert all(name.lower() in headers for name, about in declared["headers"].items() if about["required"])
    return status


def test_schemathesis_finds_nothing(limited: Server, tmp_path: Path) -> None:
    """Every check and every phase except the stateful one, since no answer links to another operation."""
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "hooks.py").write_text(HOOKS)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{limited.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}",
        "--checks", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", "40", "--seed", "1", "--generation-database", "none",
        "--continue-on-failure", "--no-color", "--report-json-path", "report.json",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] and not report["failures"] and not report["errors"] and not any(report["warnings"].values()), report
    assert {name: phase["status"] for name, phase in report["phases"].items() if name != "stateful"} == dict.fromkeys(
        ("examples", "coverage", "fuzzing"), "success"
    )
    assert report["operations"]["tested"] == len(ERRORS) and report["test_cases"]["generated"] > 800
    for path in (V3, *CLIENTS):
        for phase, count in report["valid_rates"][f"POST {path}"].items():
            assert count["accepted"] and not count["rejected"] and not count["unreachable"], (path, phase)


def test_every_example_is_answered(limited: Server, document: Any) -> None:
    names = {}
    for path in (V3, *CLIENTS):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        names[path] = list(content["examples"])
        for example in content["examples"].values():
            jsonschema_rs.validate(content["schema"], example["value"])
            assert conforms(document, path, limited.post(example["value"], path)) == 200, example
    assert names == {V3: ["fast", "standard", "optimal", "best", "maxsim"], "/v1/rerank": ["cohere"], "/v2/rerank": ["cohere"], "/rerank": ["tei", "jina"]}


def test_every_status_of_the_contract_is_declared(document: Any) -> None:
    found = {path: set(next(iter(operations.values()))["responses"]) - {"200"} for path, operations in document["paths"].items()}
    assert found == ERRORS
    for operations in document["paths"].values():
        for status, answer in next(iter(operations.values()))["responses"].items():
            headers = {"401": {"WWW-Authenticate"}, "415": {"Accept-Encoding"}, "429": {"Retry-After"}, "503": {"Retry-After"}}.get(status, set()) | {
                "X-Request-ID"
            }
            assert answer["headers"].keys() == headers and answer["description"]
            assert all(jsonschema_rs.meta.is_valid(content["schema"]) for content in answer["content"].values())


@pytest.mark.parametrize("path", [V3, *CLIENTS])
def test_answers_are_the_declared_ones(limited: Server, document: Any, path: str) -> None:
    outcomes = [
        (limited.post(BASE | {"documents": ["a", {"text": "b", "n": 1}], "return_documents": True}, path), 200),
        (limited.post(BASE, path, key="wrong"), 401),
        (limited.post(BASE | {"model": "nobody"}, path), 404),
        (limited.post(b" " * (33 << 20), path), 413),
        (limited.post(BASE, path, **{"Content-Encoding": "br"}), 415),
        (limited.post(BASE | {"documents": [{}], "query": " "}, path), 422),
        (limited.post(b"{", path), 422),
    ]
    assert [conforms(document, path, outcome) for outcome, _ in outcomes] == [status for _, status in outcomes]


def test_routes_that_are_read_answer_as_declared(limited: Server, document: Any) -> None:
    for path in ERRORS.keys() - {V3, *CLIENTS}:
        assert conforms(document, path, limited.get(path), "get") == 200
        assert "security" not in document["paths"][path]["get"], "they need no key"


@pytest.fixture(scope="module")
def trouble() -> Iterator[Server]:
    """A server that needs no key, has room for one request, never answers it, and times out soon."""
    with serving("--no-auth", "--max-queue-tokens", "1", "--timeout", "2.5", code=STUCK) as running:
        yield running


def test_without_keys_the_document_speaks_of_none(trouble: Server, document: Any) -> None:
    def mentions(found: Any) -> list[bool]:
        return ["security" in operation or "401" in operation["responses"] for operations in found["paths"].values() for operation in operations.values()]

    assert sum(mentions(document)) == 4 and document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    without = trouble.get("/openapi.json")[1]
    assert not any(mentions(without)) and "securitySchemes" not in without.get("components", {}) and "security" not in without
    assert trouble.post(BASE | {"model": "nobody"}, key=None)[0] == 404


def test_answers_in_trouble_are_the_declared_ones(trouble: Server) -> None:
    document, outcomes = trouble.get("/openapi.json")[1], {}

    def wait(path: str) -> threading.Thread:
        """Sends a request that is never answered, and returns when it fills the queue."""
        thread = threading.Thread(target=lambda: outcomes.update({path: trouble.post(BASE, path, key=None)}))
        thread.start()
        eventually(lambda: trouble.metric("rerank_lab_queue_tokens") > 0)
        return thread

    waiting = wait(V3)
    assert {conforms(document, path, trouble.post(BASE, path, key=None)) for path in (V3, *CLIENTS)} == {429}
    waiting.join()
    assert conforms(document, V3, outcomes[V3]) == 504
    assert {conforms(document, path, trouble.post(BASE | {"query": "dynamite"}, path, key=None)) for path in (V3, *CLIENTS)} == {500}
    waiting = wait("/v1/rerank")
    trouble.process.send_signal(signal.SIGTERM)
    eventually(lambda: trouble.get("/ready")[0] == 503)
    assert {conforms(document, path, trouble.post(BASE, path, key=None)) for path in (V3, *CLIENTS)} == {503}
    assert {conforms(document, path, trouble.get(path), "get") for path in ("/ready", "/api/v3/models")} == {503}
    waiting.join()
    assert conforms(document, "/v1/rerank", outcomes["/v1/rerank"]) == 504


GOOD: list[dict[str, Any]] = [
    *(BASE | {"model": model, **more} for model in BI for more in ({}, {"method": "fast", "model_cross": "whatever"}, {"method": "best"})),
    *(BASE | {"method": "standard", "model": model, "model_cross": cross} for model in BI + CROSS for cross in CROSS),
    *(BASE | {"method": method, "model": model, "model_cross": cross} for method in ("optimal", "best") for model in BI for cross in CROSS),
    BASE | {"model_cross": None},
    BASE | {"method": "best", "model_cross": None},
    BASE | {"documents": [{"text": "", "more": [1]}, "a"] * 15, "unheard": "of", "return_documents": True},
    BASE | {"top_n": None, "batch_size": None},
    *(BASE | {field: value} for field in ("top_n", "stage1_top_k", "max_tokens_per_doc", "batch_size") for value in (1, 2**63 - 1)),
    *(BASE | {"query": query} for query in ("\ufeff", " a ", "\u200b", "\x00")),
]
NO_DOCUMENTS: list[Any] = [[], ["a"] * 31, "a", None, [None], [["a"]], [{}], [{"text": 1}], [{"text": None}]]
BAD: list[Any] = [
    *(BASE | {"method": method} | more for method in ("standard", "optimal") for more in ({}, {"model_cross": None}, {"model_cross": "whatever"})),
    *(BASE | {"method": method, "model_cross": bi} for method in ("standard", "optimal", "best") for bi in BI),
    *(BASE | {"method": method, "model": cross, "model_cross": CROSS[0]} for method in ("fast", "optimal", "best") for cross in CROSS),
    *(BASE | {"method": method, "model": "whatever", "model_cross": CROSS[0]} for method in ("fast", "standard", "optimal", "best", "maxsim")),
    *({key: value for key, value in BASE.items() if key != left_out} for left_out in BASE),
    *(BASE | {"method": method} for method in ("fastest", None, "")),
    *(BASE | {"model": value} for value in (None, 1, "")),
    BASE | {"model_cross": 1},
    *(BASE | {"documents": documents} for documents in NO_DOCUMENTS),
    *(BASE | {field: value} for field in ("top_n", "stage1_top_k", "max_tokens_per_doc", "batch_size") for value in (0, -1, "3", True, 1.5, 2**63)),
    BASE | {"stage1_top_k": None},
    BASE | {"max_tokens_per_doc": None},
    *(BASE | {"return_documents": value} for value in (1, "true", None)),
    *(BASE | {"query": query} for query in ("", " \t\r\n", "\x1c\x1d\x1e\x1f", "\x85\xa0", "\u2028\u3000", None, 1)),
    [BASE],
    "text",
    None,
]


def test_the_schema_and_the_server_take_the_same_bodies(limited: Server, document: Any) -> None:
    validator = jsonschema_rs.Draft202012Validator(request_schema(document, V3))
    for bodies, good in ((GOOD, True), (BAD, False)):
        for body in bodies:
            status = limited.post(body)[0]
            assert validator.is_valid(body) == good and (status == 200 if good else status in (404, 422)), (status, body)


TEI: list[dict[str, Any]] = [{"model": CROSS[0], "raw_scores": True}, {"return_text": None}, *({"model": model} for model in ("whatever", 1, None))]
TEI += [{"truncate": False}, {"truncate": None}, *({"truncation_direction": name} for name in ("Left", "left", "Right", "right", None))]


@pytest.mark.parametrize("path", CLIENTS)
def test_so_do_those_of_the_routes_for_clients(limited: Server, document: Any, path: str) -> None:
    validator = jsonschema_rs.Draft202012Validator(request_schema(document, path))
    rest: dict[str, Any] = {"query": "q", "documents": ["a", {"text": "b", "title": "c"}]}
    tei: dict[str, Any] = {"query": "q", "texts": ["a", ""]}
    fields: dict[str, Any] = rest | {"documents": ["a", {"title": "b", "n": 1}], "rank_fields": ["title"]}
    good = [rest, fields, *(rest | {"rank_fields": names} for names in (None, [], ["text"], ["title", "text"]))]
    good += [*(rest | {"model": model} for model in [*BI, *CROSS, None]), rest | {"top_n": 2**63 - 1, "top_k": None}, rest | {"return_documents": None}]
    good += [rest | {"truncation": False, "max_chunks_per_doc": 10, "max_doc_length": 1}, rest | {"truncation": None, "max_chunks_per_doc": None}]
    bad: list[Any] = [
        rest | {"model": "whatever"},
        rest | {"top_n": 2**63},
        rest | {"top_k": 0},
        rest | {"query": "\x1f"},
        rest | {"documents": ["a"] * 31},
        rest | {"documents": [{"title": "no text"}]},
        *(fields | {"rank_fields": names} for names in (["title", "title"], "title", [1], [None], {"title": 1}, {}, 0, False)),
        *(fields | {"documents": documents} for documents in ([], ["a"] * 31, [1], [None], [["a"]])),
        rest | {"truncation": "no"},
        *(rest | {name: 0} for name in ("max_chunks_per_doc", "max_doc_length")),
        [],
    ]
    (good if path == "/rerank" else bad).extend([tei, *(tei | more for more in TEI)])
    bad += [tei | {"texts": [{"text": "a"}]}, tei | {"texts": []}, tei | {"texts": ["a"] * 31}, {"query": "q"}]
    if path == "/rerank":
        good, bad = [*good, rest | tei], [*bad, rest | {"texts": []}, rest | {"texts": None}, tei | {"raw_scores": 1}]
        bad += [tei | {"truncation_direction": "Both"}, tei | {"truncate": 0}]
    for bodies, wanted in ((good, True), (bad, False)):
        for body in bodies:
            status = limited.post(body, path)[0]
            assert validator.is_valid(body) == wanted and (status == 200 if wanted else status in (404, 422)), (status, body)


def test_blank_is_the_same_in_every_dialect() -> None:
    validator = jsonschema_rs.Draft202012Validator({"pattern": NOT_BLANK})
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x11000)]):
        blank = not character.strip()
        assert (re.search(NOT_BLANK, character) is None) == (not validator.is_valid(character)) == blank, hex(ord(character))


@pytest.mark.parametrize(
    ("roles", "methods"),
    [
        ({"a": "bi-encoder"}, ["fast", "best", "maxsim"]),
        ({"a": "cross-encoder"}, ["standard"]),
        ({"a": "cross-encoder", "b": "bi-encoder"}, ["fast", "standard", "optimal", "best", "maxsim"]),
    ],
)
def test_methods_without_their_models_are_not_offered(roles: dict[str, str], methods: list[str]) -> None:
    known = ServerContract(Service(ServerSettings(None, default_model=next(iter(roles))), roles))
    for name in ("rerank_v3", "rerank_v1", "rerank"):
        content = known.operation(name)["requestBody"]["content"]["application/json"]
        assert jsonschema_rs.meta.is_valid(content["schema"]) and '"enum": []' not in json.dumps(content["schema"])
        assert all(jsonschema_rs.is_valid(content["schema"], example["value"]) for example in content["examples"].values())
    v3 = known.operation("rerank_v3")["requestBody"]["content"]["application/json"]
    assert list(v3["examples"]) == [way["properties"]["method"]["const"] for way in v3["schema"]["anyOf"]] == methods


def test_what_people_read_of_the_fields(document: Any) -> None:
    """Every field of the contract with its default, and the headers that a client may send."""
    schema = request_schema(document, V3)
    ways = {way["properties"]["method"]["const"]: way["properties"] for way in schema["anyOf"]}
    defaults = {name: about["default"] for name, about in ways["fast"].items() if "default" in about}
    assert defaults == {
        "method": "fast", "top_n": None, "stage1_top_k": 100, "max_tokens_per_doc": 512, "batch_size": None, "return_documents": False,
    }  # fmt: skip
    assert all(ways[method].keys() == {*defaults, "model", "query", "documents", "model_cross"} for method in ways)
    assert all(f"`{name}`: " in schema["description"] for name in ("model", "model_cross", "method"))
    sent = {path: [parameter["name"] for parameter in document["paths"][path]["post"]["parameters"]] for path in (V3, "/rerank")}
    assert sent == {V3: ["X-Request-ID", "X-Provider"], "/rerank": ["X-Request-ID"]}
