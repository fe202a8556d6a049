"""Misbehaving connections: endless heads, answers that nobody reads, and a server that stops in the middle of it."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.server.test_server_abuse import body, head, memory_mb, raw
from tests.serving import Server, eventually, serving


@pytest.fixture(scope="module")
def brisk() -> Iterator[Server]:
    """A server with short time limits."""
    with serving("--timeout", "2") as running:
        yield running


@pytest.mark.parametrize("lines", [[f"X-{n}: y" for n in range(200_000)], [f"X: {'y' * 4_000_000}"]], ids=["many", "long"])
@pytest.mark.parametrize("trailing", [False, True])
def test_a_head_without_end_is_refused(server: Server, lines: list[str], trailing: bool) -> None:
    endless = "\r\n".join(lines).encode()
    begin = head(None, key="wrong") + b"0\r\n" if trailing else b"GET /health HTTP/1.1\r\n"
    before = memory_mb(server)
    found = b""
    with suppress(ConnectionError):  # the server may close while the test still sends
        found = raw(server, begin, endless)
    assert not found or found.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401"))
    assert memory_mb(server) < before + 20 and server.get("/health")[0] == 200


def test_an_upgrade_that_is_not_made_loses_no_body(server: Server) -> None:
    whole = body("curl --http2 asks so")
    found = raw(server, head(len(whole), "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA") + whole)
    assert found.startswith(b"HTTP/1.1 200") and b"curl --http2 asks so" in found


def test_a_head_is_timed_from_its_own_first_byte(brisk: Server) -> None:
    with socket.create_connection(("127.0.0.1", brisk.port), 30) as connection:
        for _ in range(2):
            connection.sendall(b"GET /hea")
            time.sleep(1.2)
            connection.sendall(b"lth HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(1.2)


def test_garbage_behind_a_request_does_not_take_its_answer(server: Server) -> None:
    whole = body("answered first")
    found = raw(server, head(len(whole)) + whole + b"\x00\x01 garbage\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200") and b"answered first" in found


def test_a_websocket_is_no_route(server: Server) -> None:
    upgrade = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    for path, status in (("/", b"200"), ("/nowhere", b"404")):
        found = raw(server, "\r\n".join([f"GET {path} HTTP/1.1", "Host: here", *upgrade, "", ""]).encode())
        assert found.startswith(b"HTTP/1.1 " + status) and b"x-request-id: " in found


@pytest.mark.parametrize("begun", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nCrawling: "])
@pytest.mark.parametrize("after", ["nothing", "a request"])
def test_a_connection_without_a_request_is_closed(brisk: Server, begun: bytes, after: str) -> None:
    with socket.create_connection(("127.0.0.1", brisk.port), 30) as connection:
        if after == "a request":
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            begun = begun or b"P"  # a silent connection is kept for another request
        connection.sendall(begun)
        connection.settimeout(0.2)
        started, found = time.monotonic(), b"more"
        while found:
            try:
                found = connection.recv(65536)
            except TimeoutError:
                if begun.endswith(b": "):
                    connection.sendall(b"x")
            except ConnectionError:
                break
    assert 1.5 < time.monotonic() - started < 10


def narrow(server: Server) -> socket.socket:
    """A connection with a small receive buffer, so that the kernel holds little that the client has not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    return connection


def echoed(mark: str, megabytes: int) -> bytes:
    """A request body whose answer is as large as the body."""
    return body(mark, [{"text": mark, "ballast": "x" * (megabytes << 20)}])


def test_answers_that_nobody_reads_are_dropped_at_the_deadline(brisk: Server) -> None:
    name = 'rerank_lab_dropped_total{reason="deadline"}'
    before, memory, whole = brisk.metric(name), memory_mb(brisk), echoed("unread", 18)
    connections = [narrow(brisk) for _ in range(4)]
    for connection in connections:
        connection.sendall(head(len(whole)) + whole)
        assert connection.recv(12) == b"HTTP/1.1 200"
    eventually(lambda: brisk.metric(name) == before + 4)
    assert brisk.log.read_text().count("was not read within 2 s") == 4
    eventually(lambda: memory_mb(brisk) < memory + 40)
    for connection in connections:
        read = 0
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 20):
                read += len(piece)
        assert read < 8 << 20, "what the kernel had, and no more"
        connection.close()


def test_what_clients_have_not_read_counts_as_memory() -> None:
    whole = echoed("held", 15)
    with serving("--max-body", "16") as server:
        connections = [narrow(server) for _ in range(5)]
        statuses = []
        for connection in connections:
            connection.sendall(head(len(whole)) + whole)
            statuses.append(connection.recv(12)[-3:])
        assert statuses == [b"200"] * 4 + [b"429"]
        for connection in connections:
            connection.close()
        eventually(lambda: server.post(whole)[0] == 200)


def test_what_was_refused_is_not_held_while_the_rest_of_it_comes() -> None:
    with serving("--max-body", "1") as server:
        connections = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(5)]
        for connection in connections:
            connection.sendall(head(None) + b"110000\r\n" + b"x" * 0x110000 + b"\r\n")  # the body has no end
            assert connection.recv(12) == b"HTTP/1.1 413"
        assert server.post(body("meanwhile"))[0] == 200
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("size", [18 << 20, (4 << 20) + 50_000])
def test_a_slow_reader_gets_its_whole_answer_though_the_server_drains(size: int) -> None:
    """Also an answer that is smaller than what the kernel and the connection take at once."""
    whole = body("slow reader", [{"text": "slow reader", "ballast": "x" * size}])
    with serving() as server, narrow(server) as connection:
        connection.sendall(head(len(whole), "Connection: close") + whole)
        found = connection.recv(12)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(6.5)  # longer than uvicorn waits for connections
        found += b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert found.startswith(b"HTTP/1.1 200") and len(found) > size and found.endswith(b"}}")
        assert server.process.wait(20) == 0


def test_a_drain_ends_though_clients_go_on_knocking() -> None:
    with serving() as server:
        knocking = True

        def knock() -> None:
            while knocking:
                with suppress(OSError):
                    server.post(body("knock"))

        def linger() -> None:
            while knocking:
                with suppress(OSError):
                    raw(server, head(1 << 20, key="wrong"))

        threads = [threading.Thread(target=ask) for ask in (knock, knock, linger, linger)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(9) == 0
        knocking = False
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("signals", [2, 5, 500])
def test_told_twice_to_stop_it_stops_at_once(signals: int) -> None:
    outcomes: list[int] = []
    with serving() as server:
        long = body("cut", [f"{n} " + "words " * 200 for n in range(900)])
        thread = threading.Thread(target=lambda: outcomes.append(server.post(long)[0]))
        thread.start()
        eventually(lambda: server.metric("rerank_lab_model_seconds_total") > 0)
        with socket.create_connection(("127.0.0.1", server.port), 30) as half, socket.create_connection(("127.0.0.1", server.port), 30) as refused:
            half.sendall(head(1000) + b"half a body")
            refused.sendall(head(1000, key="wrong"))
            assert refused.recv(12) == b"HTTP/1.1 401"
            started = time.monotonic()
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(min(0.2, 2 / signals))  # many signals are spread over the shutdown
            assert server.process.wait(10) == 1, "some were not answered"
            assert time.monotonic() - started < 4
            assert half.recv(12) == b"HTTP/1.1 503"
        thread.join()
        assert outcomes == [503]
        assert "stopped with 2 unanswered" in server.log.read_text() and "Traceback" not in server.log.read_text()


def test_from_loading_to_draining() -> None:
    """503 until the models are warm. After SIGTERM, requests in flight are answered, new ones are refused, and the exit code is 0."""
    slow = "import time\nfrom rerank_lab.server.fleet import Fleet\nwarm = Fleet.warm\nFleet.warm = lambda self: (time.sleep(1), warm(self))"
    outcomes: dict[str, tuple[int, Any, dict[str, str]]] = {}
    with serving(code=slow, wait=False) as server:
        assert server.get("/health")[0] == 200
        status, answer, headers = server.get("/ready")
        assert status == 503 and "loading" in answer["detail"] and headers["retry-after"]
        assert [server.send("HEAD", path)[:2] for path in ("/health", "/ready")] == [(200, None), (503, None)]
        assert server.post(body("early"))[0] == 503 and server.get("/api/v3/models")[0] == 503
        assert server.post(body("early"), key="wrong")[0] == 401
        eventually(lambda: server.get("/ready")[0] == 200, 60)
        assert server.post(body("now"))[0] == 200

        long = body("in flight", [f"{n} " + "words " * 200 for n in range(40)])
        threads = [threading.Thread(target=lambda n=n: outcomes.update({f"long {n}": server.post(long)})) for n in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: server.metric("rerank_lab_requests_in_flight") == 3)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/ready")[0] == 503)
        status, answer, headers = server.post(body("too late"))
        assert status == 503 and "draining" in answer["detail"] and int(headers["retry-after"]) >= 1
        assert server.get("/health")[0] == 200
        for thread in threads:
            thread.join()
        assert server.process.wait(20) == 0
    assert [outcome[0] for outcome in outcomes.values()] == [200] * 3
