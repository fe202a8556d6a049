"""Forms in which requests arrive: methods, targets, encodings, pages of other origins, a proxy in front."""

from __future__ import annotations

import gzip
import html
import re
import socket
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import orjson
import pytest

from rerank_lab.server.__main__ import main
from tests.server.test_server_abuse import body, head, memory_mb, raw
from tests.serving import KEY, STUCK, Server, eventually, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

V3 = "/api/v3/inference/reranker"
POSTS = [V3, "/v1/rerank", "/v2/rerank", "/rerank"]
GETS = ["/health", "/ready", "/metrics", "/api/v3/models", "/openapi.json", "/docs", "/", "/docs-assets/swagger-ui.css"]
PAGE, EVIL = "https://app.example:3000", "https://evil.example"


@pytest.fixture(scope="module")
def special() -> Iterator[Server]:
    """A server that takes bodies of one MiB and pages of every origin. Its prefix looks like one of its routes."""
    with serving("--max-body", "1", "--cors-origin", "*", "--root-path", "/v1/") as running:
        yield running


# HEAD


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    status, found, headers = server.send("HEAD", path)
    wanted = server.get(path)
    same = wanted[2].keys() - {"date", "x-request-id", *(["content-length"] if path == "/metrics" else [])}
    assert status == wanted[0] == 200 and found is None and int(headers["content-length"]) > 0
    assert {name: headers[name] for name in same} == {name: wanted[2][name] for name in same} and headers["x-request-id"]


def test_head_of_what_cannot_be_read(server: Server) -> None:
    assert [server.send("HEAD", path)[0] for path in (V3, "/rerank", "/nowhere")] == [405, 405, 404]


def test_head_leaves_the_connection_as_it_was(server: Server) -> None:
    heads = b"HEAD /health HTTP/1.1\r\nHost: here\r\n\r\n" * 2
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(heads + b"GET /health HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        found = b"".join(iter(lambda: connection.recv(65536), b""))
    assert found.count(b"HTTP/1.1 200") == 3 and found.count(b'{"status":"ok"}') == 1 and found.endswith(b'{"status":"ok"}')


# Encodings


def compressed(text: bytes, members: int = 1) -> bytes:
    """Compresses data by gzip, into one or several members that follow each other."""
    size = -(-len(text) // members)
    return b"".join(gzip.compress(text[i : i + size]) for i in range(0, len(text), size))


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(("named", "members"), [("gzip", 1), ("GZip", 3), ("x-gzip", 1), ("identity", 0), ("", 0)])
def test_bodies_may_be_compressed(server: Server, path: str, named: str, members: int) -> None:
    plain = body("compressed \u00e9")
    sent = compressed(plain, members) if members else plain
    status, answer, _ = server.post(sent, path, **{"Content-Encoding": named})
    wanted = server.post(plain, path)[1]
    assert status == 200 and answer["results"] == wanted["results"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("named", ["br", "zstd", "deflate", "gzip, gzip", "gzip, identity", "gzip;q=1", "utf-8", "*"])
def test_other_encodings_are_415(server: Server, path: str, named: str) -> None:
    status, answer, headers = server.post(body("x"), path, **{"Content-Encoding": named})
    assert status == 415 and answer.keys() == {"detail"} and "gzip" in answer["detail"] and headers["accept-encoding"] == "gzip, identity"
    assert server.post(body("x"), path, key="wrong", **{"Content-Encoding": named})[0] == 401, "the key comes first"


def test_two_headers_are_two_encodings(server: Server) -> None:
    sent = compressed(body("x"))
    assert raw(server, head(len(sent), "Content-Encoding: gzip", "Content-Encoding: gzip") + sent).startswith(b"HTTP/1.1 415")


GOOD = compressed(body("x"))
DAMAGED = {
    "plain": body("x"), "empty": b"", "halved": GOOD[: len(GOOD) // 2], "no sum": GOOD[:-8], "wrong sum": GOOD[:-8] + b"\0" * 8, "rest": GOOD + b"rest",
    "zlib": zlib.compress(body("x")), "second halved": GOOD + GOOD[:-1], "a great many": gzip.compress(b"") * 2000 + GOOD,
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_gzip_is_malformed(server: Server, name: str) -> None:
    for path in POSTS:
        status, answer, _ = server.post(DAMAGED[name], path, **{"Content-Encoding": "gzip"})
        (error,) = answer["detail"]
        assert status == 422 and error.keys() == {"loc", "msg", "type"} and (error["loc"], error["type"]) == (["body"], "gzip_invalid")


def test_what_is_in_it_is_read_as_ever(server: Server) -> None:
    for plain, kind in ((b"{", "json_invalid"), (body("x") * 2, "json_invalid"), (b'{"query": "\xff"}', "json_invalid")):
        assert server.post(compressed(plain), **{"Content-Encoding": "gzip"})[1]["detail"][0]["type"] == kind


@pytest.mark.parametrize("framing", ["announced", "chunked"])
def test_a_bomb_never_goes_off(special: Server, framing: str) -> None:
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([*(pack.compress(b" " * (1 << 24)) for _ in range(6)), pack.flush()])  # 96 MiB, compressed to less than a body may have
    assert len(bomb) < 1 << 20
    before = memory_mb(special)
    sent = head(len(bomb), "Content-Encoding: gzip") + bomb
    if framing == "chunked":
        sent = head(None, "Content-Encoding: gzip") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(bomb), bomb)
    found = raw(special, sent)
    assert found.startswith(b"HTTP/1.1 413") and b'{"detail":"The body may hold 1048576 bytes."}' in found
    assert memory_mb(special) < before + 30 and special.post(GOOD, **{"Content-Encoding": "gzip"})[0] == 200


def test_a_small_body_never_becomes_a_thousand_times_itself(server: Server) -> None:
    sent = compressed(body("x") + b" " * (3 << 20))
    assert len(sent) < 10_000 and server.post(sent, **{"Content-Encoding": "gzip"})[0] == 413
    text = " ".join(f"{n:x}" for n in range(300_000))  # 2 MB without repetitions
    assert server.post(compressed(body(text)), **{"Content-Encoding": "gzip"})[0] == 200


def test_the_bound_is_what_is_read(special: Server) -> None:
    def padded(size: int) -> bytes:
        plain = body("x")
        return compressed(plain + b" " * (size - len(plain)))

    assert special.post(padded(1 << 20), **{"Content-Encoding": "gzip"})[0] == 200
    assert special.post(padded((1 << 20) + 1), **{"Content-Encoding": "gzip"})[0] == 413
    endless = b"\x1f\x8b\x08\x08" + b"\0" * 6 + b"n" * (2 << 20)  # a gzip header whose file name never ends
    assert special.post(endless, **{"Content-Encoding": "gzip"})[0] == 413
    assert raw(special, head(None, "Content-Encoding: gzip") + b"%x\r\n%b\r\n" % (len(endless), endless)).startswith(b"HTTP/1.1 413")


# Targets


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("written", ["{}/", "/{}", "{}//", "//{}/", "{}/?a=b", "http://here:1234{}", "HTTPS://here//{}/", "http://[::1]:80{}?a=b"])
def test_targets_that_name_a_route_are_served(server: Server, path: str, written: str) -> None:
    whole = body("the same")
    sent = head(len(whole), path=written.format(path)) + whole
    wanted = orjson.loads(raw(server, head(len(whole), path=path) + whole).partition(b"\r\n\r\n")[2])["results"]
    found = raw(server, sent)
    assert found.startswith(b"HTTP/1.1 200") and orjson.loads(found.partition(b"\r\n\r\n")[2])["results"] == wanted
    assert raw(server, sent.replace(KEY.encode(), b"wrong")).startswith(b"HTTP/1.1 401")


def test_so_are_those_that_are_read(server: Server) -> None:
    for path in GETS:
        wanted = server.get(path)[1]
        for written in (f"{path}/", f"/{path}", path.replace("/", "//")):
            status, found, _ = server.get(written)
            assert status == 200 and (path in ("/metrics", "/docs") or found == wanted), written
    for target in (b"http://here/health", b"http://here/health/", b"http://here", b"http://here?x=/nowhere"):
        assert raw(server, b"GET " + target + b" HTTP/1.1\r\nHost: here\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "target",
    ["/v1/rerankk", "/v1", "/v1/re/rank", "/v1rerank", "/rerank/v1", "v1/rerank", "*", "http:/v1/rerank", "/http://here/v1/rerank", "http://v1/rerank/x"],
)
def test_what_names_none_is_not(server: Server, target: str) -> None:
    whole = body("x")
    found = raw(server, head(len(whole), path=target) + whole)
    assert found.startswith(b"HTTP/1.1 404") and found.endswith(b'{"detail":"Not Found"}')


def test_they_are_counted_as_what_they_are(server: Server) -> None:
    name = 'rerank_lab_requests_total{route="/v1/rerank",status="200"}'
    assert server.post(body("x"), "/v1/rerank")[0] == 200
    before = server.metric(name)
    assert server.post(body("x"), "//v1/rerank/")[0] == 200 and server.metric(name) == before + 1


# Pages of other origins


@pytest.fixture(scope="module")
def crossing() -> Iterator[Server]:
    """A server that pages of two origins may ask. One query breaks its model, and one request fills its queue."""
    flags = ("--cors-origin", PAGE, "--cors-origin", "HTTP://LocalHost:80/", "--max-queue-tokens", "1", "--timeout", "1.5")
    with serving(*flags, code=STUCK) as running:
        yield running


ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type, x-fern-sdk-name"}


@pytest.mark.parametrize("origin", [PAGE, "http://localhost"])
@pytest.mark.parametrize("path", [*POSTS, "/v1/rerank/", "/health"])
def test_preflights_of_known_origins_pass(crossing: Server, path: str, origin: str) -> None:
    status, _, headers = crossing.send("OPTIONS", path, Origin=origin, **ASKS, **{"Access-Control-Request-Private-Network": "true"})
    assert status == 200 and headers["access-control-allow-origin"] == origin and headers["x-request-id"] and "Origin" in headers["vary"]
    assert headers["access-control-allow-headers"] == ASKS["Access-Control-Request-Headers"]
    assert "POST" in headers["access-control-allow-methods"] and headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in headers


@pytest.mark.parametrize("origin", [EVIL, "https://app.example", "http://app.example:3000", f"{PAGE}.evil.example", "null"])
def test_those_of_others_do_not(crossing: Server, origin: str) -> None:
    status, answer, headers = crossing.send("OPTIONS", V3, Origin=origin, **ASKS)
    assert status == 400 and answer.keys() == {"detail"} and "--cors-origin" in answer["detail"] and "access-control-allow-origin" not in headers
    _, _, headers = crossing.send("GET", "/health", Origin=origin)
    assert "access-control-allow-origin" not in headers


def test_answers_may_be_read_whatever_they_are(crossing: Server) -> None:
    found: dict[int, dict[str, str]] = {}

    def ask(data: Any, path: str = V3, key: str = KEY, **more: str) -> None:
        status, _, headers = crossing.post(data, path, key, Origin=PAGE, **more)
        found[status] = headers

    waiting = threading.Thread(target=ask, args=(body("never answered"),))
    waiting.start()
    eventually(lambda: crossing.metric("rerank_lab_queue_tokens") > 0)
    for path in POSTS:
        ask(b"{", path)
        ask(body("x", model="nobody"), path)
    ask(body("x"), key="wrong")
    ask(body("x"))
    ask(b" " * (33 << 20))
    ask(body("x"), **{"Content-Encoding": "br"})
    waiting.join()
    ask(body("dynamite"))
    last = threading.Thread(target=ask, args=(body("never answered either"),))
    last.start()
    eventually(lambda: crossing.metric("rerank_lab_queue_tokens") > 0)
    found[405], found[200] = (crossing.send(method, "/health", Origin=PAGE)[2] for method in ("PUT", "GET"))
    for _ in range(2):  # told twice to stop, it leaves requests unanswered
        crossing.process.terminate()
        time.sleep(0.2)
    last.join()
    assert found.keys() == {200, 401, 404, 405, 413, 415, 422, 429, 500, 503, 504}
    for headers in found.values():
        assert headers["access-control-allow-origin"] == PAGE and headers["vary"] == "Origin"
        assert {"X-Request-ID", "Retry-After", "Server-Timing"} <= set(headers["access-control-expose-headers"].split(", "))


def test_any_origin_where_that_is_said(special: Server) -> None:
    for status, _, headers in (special.send("OPTIONS", V3, Origin=EVIL, **ASKS), special.send("GET", "/health", Origin="null")):
        assert status == 200 and headers["access-control-allow-origin"] == "*"


def test_none_where_nothing_is_said(server: Server) -> None:
    status, _, headers = server.send("OPTIONS", V3, Origin=PAGE, **ASKS)
    assert status == 405 and not any(name.startswith("access-control") for name in headers)
    assert not any(name.startswith("access-control") or name == "vary" for name in server.post(body("x"), Origin=PAGE)[2])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(
            ("--cors-origin", value)
            for value in ("", "app.example", "https://", "https://app.example/page", "https://user@app.example", "https://app.example?x", "*.example")
        ),
        *(("--root-path", value) for value in ("rerank", "/a b", "/a//b", "/../b", "http://here/rerank", '/"><script>', "/a?b")),
    ],
)
def test_what_no_browser_would_send_is_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([flag, value])
    assert caught.value.code == 2 and f"argument {flag}: must be" in capsys.readouterr().err


def test_a_prefix_that_is_a_route_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root-path", "/rerank", "--no-auth", "--port", "0"]) == 2
    assert "--root-path /rerank: the server has a route of that name itself" in capsys.readouterr().err


# Proxies


@contextmanager
def proxy(server: Server, prefix: str, *, strips: bool) -> Iterator[str]:
    """The address of a server behind a real reverse proxy, which serves nothing but the prefix."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            path, query, rest = self.path.partition("?")
            if path != prefix and not path.startswith(f"{prefix}/"):
                self.send_error(404, "not under the prefix")
                return
            behind = (path[len(prefix) :] or "/") if strips else path
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
            try:
                answer = urllib.request.urlopen(urllib.request.Request(server.url + behind + query + rest, sent, headers, method=self.command), timeout=60)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in ("date", "server", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.read())

        do_GET = do_HEAD = do_POST = handle_any

        def log_message(self, *_: Any) -> None:
            """Logs nothing."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}{prefix}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def shown(url: str) -> Server:
    """A Server object for an address that has no process of its own."""
    return Server(url, None, Path())  # type: ignore[arg-type]


def linked(url: str) -> dict[str, tuple[int, Any]]:
    """Every address that a page names, resolved as a browser does → the answer at that address."""
    status, text, _ = shown(url).get("")
    assert status == 200
    base = re.search(r'<base href="([^"]*)"', text)
    place = urljoin(url, html.unescape(base.group(1)) if base else "")
    names = ["".join(pair) for pair in re.findall(r"""<(?:a|link|script|img)\b[^>]*(?:src|href)="([^"]+)|(?:\burl: |fetch\(|new URL\()["']([^"']+)""", text)]
    found = {urljoin(place, html.unescape(name)) for name in names if not name.startswith("data:")}
    return {where: shown(where).get("")[:2] for where in found}


@pytest.mark.parametrize("strips", [True, False], ids=["stripping", "passing on"])
def test_behind_a_prefix_everything_is_found(special: Server, strips: bool) -> None:
    with proxy(special, "/v1", strips=strips) as url:
        for page, least in ((url, 5), (f"{url}/", 5), (f"{url}/docs", 4), (f"{url}/docs/", 4)):
            there = linked(page)
            assert len(there) >= least and all(where.startswith(f"{url}/") for where in there), there.keys()
            assert {where: status for where, (status, _) in there.items() if status != 200} == ({f"{url}{V3}": 405} if "docs" not in page else {})
        document = shown(url).get("/openapi.json")[1]
        assert document["servers"] == [{"url": "/v1"}]
        at = shown(urljoin(url, document["servers"][0]["url"]))
        for path in POSTS:
            assert at.post(body("through a proxy"), path)[0] == at.post(body("through a proxy"), f"{path}/")[0] == 200
            assert at.post(body("x"), path, key="wrong")[0] == 401
        assert all(at.send(method, path)[0] == 200 for path in ("/health", "/ready", "/metrics", "/api/v3/models") for method in ("GET", "HEAD"))
        assert at.get("/nowhere")[0] == at.get("/v1/nowhere")[0] == 404


def test_without_the_proxy_everything_is_found_too(special: Server) -> None:
    for page in ("/", "/docs", "/docs/"):
        assert {status for status, _ in linked(special.url + page).values()} <= {200, 405}
    assert {special.post(body("x"), path)[0] for path in POSTS} == {200}
    name = 'rerank_lab_requests_total{route="/rerank",status="200"}'
    before = special.metric(name)
    assert special.post(body("x"), "/v1/v1/rerank")[1]["object"] == "list" and special.metric(name) == before, "one prefix is taken off"


def test_docs_need_no_flag_where_a_proxy_strips(server: Server) -> None:
    with proxy(server, "/deep/inside", strips=True) as url:
        for page in ("/docs", "/docs/", "/"):
            there = linked(url + page)
            assert len(there) >= 4 and all(where.startswith(f"{url}/") and status in (200, 405) for where, (status, _) in there.items())
    assert "servers" not in server.get("/openapi.json")[1] and "<base" not in server.get("/")[1]


def test_page_allows_its_own_base_alone(special: Server, server: Server) -> None:
    assert "; base-uri 'self';" in special.get("/")[2]["content-security-policy"] and "; base-uri 'none';" in server.get("/")[2]["content-security-policy"]


def test_page_and_docs_work_behind_a_proxy(browser: Browser, special: Server) -> None:
    with proxy(special, "/v1", strips=True) as url, browser.new_context() as context:
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"{url}#key={KEY}")
        page.click("#run")
        page.locator("#status").filter(has_text=re.compile("^Done")).wait_for(timeout=20_000)
        assert f"{url}{V3}" in page.inner_text("#curl")
        assert said == []
        page.goto(f"{url}/docs")
        page.locator("#operations-default-rerank_v3_api_v3_inference_reranker_post").wait_for(timeout=20_000)
