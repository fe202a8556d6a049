"""Recorded requests to two servers, and the report about their answers."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rerank_lab.client.v3 import KEY, V3
from rerank_lab.replay.__main__ import main
from rerank_lab.replay.answers import Answer, compare
from tests.conftest import DOCUMENTS, QUERIES
from tests.serving import KEY as SERVER_KEY
from tests.serving import Server
from tests.standin import StandIn, error, ok, standing_in

COMMAND = [sys.executable, "-m", "rerank_lab.replay"]
TEXTS = [text for _, text in DOCUMENTS.values()]
SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def a() -> Iterator[StandIn]:
    with standing_in() as running:
        yield running


@pytest.fixture
def b() -> Iterator[StandIn]:
    with standing_in() as running:
        yield running


def body(query: str = "q1", **more: Any) -> dict[str, Any]:
    return {"model": "all-MiniLM-L6-v2", "query": QUERIES[query], "documents": TEXTS} | more


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Four requests, on lines 1, 3, 4 and 5."""
    lines = [body("q1"), None, body("q2", method="best"), body("q3", top_n=2), {"body": body("q4"), "path": "/v1/rerank"}]
    path = tmp_path / "requests.jsonl"
    path.write_text("\ufeff" + "".join("  \r\n" if line is None else json.dumps(line) + "\r\n" for line in lines))
    return path


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    """Runs the command, which must end with this exit code. Returns what it prints: stderr for code 2, stdout otherwise."""
    try:
        ended = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        ended = int(str(stop.code))
    found = capsys.readouterr()
    assert ended == code, found
    assert "Traceback" not in found.err
    return found.err if code == 2 else found.out


def test_the_same_answers_are_the_same(a: StandIn, b: StandIn, requests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 0, requests, a.url, b.url)
    assert "4 requests, 4 same; differing in order 0, score 0, status 0, shape 0\n" in text
    assert "medians over 4 rankings: Kendall's tau 1.0000, overlap at 10 1.0000" in text
    assert f"{a.url}: 4 x 200" in text and "p50 ms    p95 ms" in text and all(len(line) <= 80 for line in text.splitlines())
    assert a.bodies == b.bodies == [body("q1"), body("q2", method="best"), body("q3", top_n=2), body("q4")], "as they were recorded"
    assert [path for path, _, _ in a.asked] == [V3, V3, V3, "/v1/rerank"] and a.connections == b.connections == 1


def test_each_difference_is_named_with_its_line_and_counted(a: StandIn, b: StandIn, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.8}, {"index": 2, "relevance_score": 0.1}]
    plain = [{"index": 0, "relevance_score": 0.9}, {"index": 1, "relevance_score": 0.8}, {"index": 2, "relevance_score": 0.1}]
    a.replies = [ok({"results": plain, "meta": {}}), error(422, [{"loc": ["body"], "msg": "m", "type": "t"}]), ok({"results": plain}), error(404, "who?")]
    b.replies = [ok({"results": swapped, "meta": {}}), error(422, "no"), ok({"results": plain}), ok({"results": plain})]
    text = said(capsys, 1, requests, a.url, b.url, "--json", tmp_path / "out.json")
    assert f"{requests}:1 POST {V3}\n  order: first at rank 1: A has index 0 (0.9), B has index 1 (0.9)\n  score: 2 of 3 beyond 0.0001" in text
    assert f"{requests}:3 POST {V3}\n  shape: of the 422: A {{" in text and f'{requests}:5 POST /v1/rerank\n  status: A 404 ("who?"), B 200\n' in text
    assert f"{requests}:4" not in text
    assert "4 requests, 1 same; differing in order 1, score 1, status 1, shape 1\n" in text
    assert "medians over 2 rankings: Kendall's tau 0.6667, overlap at 10 1.0000" in text, "of 1/3 and 1"
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["a"], found["b"], found["recorded"], found["compared"], found["same"]) == (a.url, b.url, 4, 4, 1)
    assert found["differing"] == {"order": 1, "score": 1, "status": 1, "shape": 1, "set": 0, "value": 0, "no answer": 0} and not found["interrupted"]
    assert found["kendall_tau_median"] == pytest.approx(2 / 3) and found["latency_ms_a"]["p95"] >= found["latency_ms_a"]["p50"] > 0
    assert found["statuses_a"] == {"200": 2, "422": 1, "404": 1}
    assert [(one["line"], [d["kind"] for d in one["differences"]]) for one in found["differences"]] == [
        (1, ["order", "score"]),
        (3, ["shape"]),
        (5, ["status"]),
    ]
    assert not list(tmp_path.glob("*.tmp"))


def results(*pairs: tuple[int, float], **more: Any) -> dict[str, Any]:
    return {"results": [{"index": i, "relevance_score": score} for i, score in pairs]} | more


def echo(text: str) -> dict[str, Any]:
    return {"results": [{"index": 0, "relevance_score": 0.5, "document": text}]}


THREE = results((0, 0.9), (1, 0.5), (2, 0.1))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (THREE, THREE, []),
        (THREE, results((0, 0.90009), (1, 0.49991), (2, 0.1)), []),
        (THREE, results((0, 0.9), (1, 0.4998), (2, 0.1)), [("score", "1 of 3 beyond 0.0001, most at index 1: A 0.5, B 0.4998")]),
        (
            THREE,
            results((0, 0.9), (2, 0.5), (1, 0.1)),
            [("order", "first at rank 2: A has index 1 (0.5), B has index 2 (0.5)"), ("score", "2 of 3 beyond 0.0001, most at index 1: A 0.5, B 0.1")],
        ),
        (
            results((0, 0.9), (1, 0.50001), (2, 0.5)),
            results((0, 0.9), (2, 0.50001), (1, 0.5)),
            [("order", "first at rank 2: A has index 1 (0.50001), B has index 2 (0.50001) (scores within the tolerance)")],
        ),
        (THREE, results((0, 0.9), (1, 0.5)), [("set", "only A ranks index 2")]),
        (
            results((0, 0.9), (1, 0.8)),
            results((7, 0.95), (1, 0.8), (0, 0.8)),
            [
                ("set", "only B ranks index 7"),
                ("order", "first at rank 1 of those that both rank: A has index 0 (0.9), B has index 1 (0.8)"),
                ("score", "1 of 2 beyond 0.0001, most at index 0: A 0.9, B 0.8"),
            ],
        ),
        (echo("x"), echo("x"), []),
        (echo("x"), echo("y"), [("value", "results[].document differs at index 0")]),
        (echo("x"), results((0, 0.5)), [("shape", "only A has results[].document")]),
        (results(meta={"method": "fast"}), results(), [("shape", "only A has meta")]),
        (results(meta={"method": "fast"}), results(meta={"method": "best", "k": 1}), [("shape", "only B has meta.k"), ("value", 'meta.method: A "fast", B "best"')]),
        (results(id="1", usage={"tokens": 3}), results(id="2", usage={"tokens": 4}), []),
        (results(id="1"), results(), [("shape", "only A has id")]),
        ([{"index": 0, "score": 0.5}], [{"index": 0, "score": 0.7}], [("score", "1 of 1 beyond 0.0001, most at index 0: A 0.5, B 0.7")]),
        ({"data": [{"index": 0, "relevance_score": 0.5}]}, {"data": [{"index": 1, "relevance_score": 0.5}]}, [("set", "only A ranks index 0"), ("set", "only B ranks index 1")]),
        (THREE, "<html>", [("shape", "A holds a ranking, B holds no ranking")]),
        ("<html>", "<html>", [("shape", "A holds no ranking, B holds no ranking")]),
        (THREE, results((0, 0.9), (0, 0.5)), [("shape", "A holds a ranking, B holds a ranking with index 0 twice")]),
        (THREE, results((0, float("nan"))), [("shape", "A holds a ranking, B holds a ranking without a finite score at rank 1")]),
        (THREE, {"results": [{"score": 1}]}, [("shape", "A holds a ranking, B holds a ranking without an index at rank 1")]),
    ],
)  # fmt: skip
def test_what_differs_between_two_rankings(a: Any, b: Any, expected: list[tuple[str, str]]) -> None:
    assert compare(Answer(200, a, 0.1), Answer(200, b, 0.1), 1e-4)[0] == expected


@pytest.mark.parametrize(
    ("a", "b", "kinds"),
    [
        ((404, {"detail": "x"}), (404, {"detail": "other words"}), []),
        ((404, {"detail": "x"}), (404, {"error": "x"}), ["shape"]),
        ((422, {"detail": [{"loc": ["a", 1], "msg": "m"}]}), (422, {"detail": [{"loc": ["b", 2], "msg": "n"}, {"loc": [1, "c"], "msg": ""}]}), []),
        ((422, {"detail": [{"loc": ["a"], "msg": "m"}]}), (422, {"detail": [{"loc": ["a"], "msg": "m", "input": "secret"}]}), ["shape"]),
        ((500, "text"), (500, {"detail": "text"}), ["shape"]),
        ((200, THREE), (500, {"detail": "x"}), ["status"]),
        ((None, "gone"), (200, THREE), ["no answer"]),
        ((None, "gone"), (None, "gone"), ["no answer"]),
    ],
)
def test_what_differs_between_two_errors(a: tuple[int | None, Any], b: tuple[int | None, Any], kinds: list[str]) -> None:
    found, agreed = compare(Answer(*a, 0.1), Answer(*b, 0.1), 1e-4)
    assert [kind for kind, _ in found] == kinds and agreed == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": ', ":2: no JSON"),
        ("[1]", ":2: a request is an object"),
        ('{"body": {}, "path": "v1/rerank"}', ":2: path 'v1/rerank' is none"),
        ('{"body": {}, "path": "/a b"}', ":2: path '/a b' is none"),
        ('{"path": "/v1/rerank", "query": "q", "documents": ["d"]}', ":2: a path without a body"),
        ("[" * 100_000, ":2: no JSON"),
        ("\xff", ":2: no JSON"),
    ],
)
def test_a_malformed_line_is_named(a: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"body": {}}\n' + line.encode("latin-1") + b"\n")
    assert f"{path}{message}" in said(capsys, 2, path, a.url, a.url) and not a.asked


def test_other_wrong_input(a: StandIn, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no requests" in said(capsys, 2, tmp_path / "empty.jsonl", a.url, a.url)
    assert "No such file" in said(capsys, 2, tmp_path / "none.jsonl", a.url, a.url)
    assert "URL_B: 'host' is no http" in said(capsys, 2, requests, a.url, "host")
    assert "--json" in said(capsys, 2, requests, a.url, a.url, "--json", tmp_path / "no" / "out.json")
    assert "at least 1" in said(capsys, 2, requests, a.url, a.url, "--concurrency", "0")
    monkeypatch.setenv(f"{KEY}_B", "two words")
    assert f"{KEY}_B" in said(capsys, 2, requests, a.url, a.url)
    assert not a.asked


def test_tolerance_and_limit(a: StandIn, b: StandIn, requests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shifted(answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {"results": [item | {"relevance_score": item["relevance_score"] - 0.01} for item in answer["results"]]}

    b.alter = shifted
    assert "2 requests, 0 same; differing in order 0, score 2" in said(capsys, 1, requests, a.url, b.url, "--limit", "2")
    assert "2 requests, 2 same" in said(capsys, 0, requests, a.url, b.url, "--limit", "2", "--tolerance", "0.011")


def test_each_server_gets_its_key_and_nothing_prints_it(
    a: StandIn, b: StandIn, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "shared-key")
    monkeypatch.setenv(f"{KEY}_B", SECRET)
    a.replies, b.replies = [error(403, "a")], [error(401, f"{SECRET} is unknown")]
    text = said(capsys, 1, requests, a.url, b.url, "--json", tmp_path / "out.json")
    assert {headers["authorization"] for _, headers, _ in a.asked} == {"Bearer shared-key"}
    assert {headers["authorization"] for _, headers, _ in b.asked} == {f"Bearer {SECRET}"}
    assert "(the key) is unknown" in text and SECRET not in text + (tmp_path / "out.json").read_text()


def test_requests_run_at_once_only_where_that_is_asked_for_and_the_servers_take_turns(a: StandIn, requests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a.pause = 0.05
    said(capsys, 0, requests, a.url, a.url)
    assert a.most == 1
    with standing_in() as b:
        first: list[str] = []
        a.alter = lambda answer: first.append("a") or answer  # type: ignore[func-returns-value]
        b.alter = lambda answer: first.append("b") or answer  # type: ignore[func-returns-value]
        said(capsys, 0, requests, a.url, b.url)
        assert "".join(first) == "abbaabba"
        said(capsys, 0, requests, a.url, a.url, "--concurrency", "3")
    assert a.most == 3


def test_a_server_that_is_not_there_or_leaves(a: StandIn, b: StandIn, requests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert main([str(requests), a.url, gone]) == 1
    assert f"{gone} does not answer: " in capsys.readouterr().err and len(a.asked) < 4, "it goes on with nothing to compare"
    a.replies = [*[ok(THREE)] * 2, None, None, ok(THREE)]
    b.replies = [ok(THREE)] * 4
    text = said(capsys, 1, requests, a.url, b.url)
    assert f"no answer: A: {a.url} does not answer" in text and "4 requests, 3 same" in text and "no answer 1" in text and "3 x 200, 1 x no answer" in text


def test_what_was_compared_before_ctrl_c_is_shown(a: StandIn, requests: Path, tmp_path: Path) -> None:
    with requests.open("a") as file:
        file.write((json.dumps(body("q1")) + "\n") * 200)
    command = [*COMMAND, str(requests), a.url, a.url, "--json", str(tmp_path / "out.json"), "--concurrency", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(a.asked) < 8:
        time.sleep(0.01)
    a.pause = 30
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - start < 10, "it waits for answers that no one wants"
    compared = json.loads((tmp_path / "out.json").read_text())
    assert 2 <= compared["compared"] < 204 and compared["interrupted"] and f"{compared['compared']} requests, " in out
    assert f"interrupted after {compared['compared']} of 204 requests" in err and "Traceback" not in err


def test_help_teaches_in_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = said(capsys, 0, "--help")
    assert all(word in text for word in ("examples:", "exit codes", "/v1/rerank", f"${KEY}_A"))
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_real_server_on_every_route_and_with_every_kind_of_answer(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, SERVER_KEY)
    recorded: list[Any] = [
        body(method=method, model_cross="minilm-cross", return_documents=True) for method in ("fast", "standard", "optimal", "best", "maxsim")
    ]
    recorded += [{"path": path, "body": body(return_documents=True)} for path in ("/v1/rerank", "/v2/rerank", "/rerank")]
    recorded += [{"path": "/rerank", "body": {"query": "roots", "texts": TEXTS, "return_text": True}}, body(model="no-such"), body(documents=[])]
    recorded += [{"path": "/no/such/route", "body": {}}, {"body": [1]}, body() | {"query": "\ud800"}]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in recorded))
    text = said(capsys, 0, path, server.url, f"{server.url}/")
    assert "14 requests, 14 same" in text and "medians over 9 rankings: Kendall's tau 1.0000" in text and "9 x 200, 2 x 404, 3 x 422" in text
    path.write_text(json.dumps(body(model="all-MiniLM-L6-v2")) + "\n")
    with standing_in() as other:
        other.alter = lambda answer: answer | {"meta": answer["meta"] | {"deployed_model_id": "another"}}
        text = said(capsys, 1, path, server.url, other.url)
    assert 'value: meta.deployed_model_id: A "all-MiniLM-L6-v2", B "another"' in text and "differing in order 0, score 0, status 0, shape 0, value 1" in text


DEEP = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"Content-Type": "application/json; charset=hex"}, b'{"results": []}'),
        (200, {"Content-Type": "application/json; charset=rot13"}, b'{"results": []}'),
        (200, {}, '{"results": []}'.encode("utf-16")),
        (200, {}, DEEP),
        (404, {}, DEEP),
        (200, {}, b'{"results": [], "meta": {"\\ud800\\u001b[31m": 1}}'),
        (200, {}, b'{"results": [{"index": 0, "relevance_score": 0.5, "\\ud800\\u001b": {"a": "\\ud800"}}], "\\ud800\\u001b": 2}'),
        (422, {}, b'{"detail": "\\ud800\\u001b[31m"}'),
    ],
)
def test_whatever_a_server_sends_is_a_difference(a: StandIn, b: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Any) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(body("q1")))
    a.replies = [reply]
    text = said(capsys, 1, path, a.url, b.url, "--json", tmp_path / "out.json")
    assert "1 request, 0 same" in text and text.encode() and text.replace("\n", "").isprintable()
    assert json.loads((tmp_path / "out.json").read_text())["compared"] == 1


def test_a_path_that_no_address_can_have(a: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"path": "/" + "x" * 70_000, "body": {}}))
    assert "line 1: path '/xxx" in said(capsys, 2, path, a.url, a.url) and not a.asked
