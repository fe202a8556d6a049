"""A small v3 server in a thread. It uses the real models and can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rerank_lab.methods import make_method
from rerank_lab.reranker import Reranker

RANKING = threading.Lock()
Reply = tuple[int, dict[str, str], bytes]


@cache
def models() -> Reranker:
    """Both shipped models, loaded once."""
    return Reranker("all-MiniLM-L6-v2", "standard", "minilm-cross", device="cpu")


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """The v3 answer to a valid request."""
    crossing = body.get("model_cross") is not None
    method = make_method(body.get("method", "fast"), **{k: v for k, v in body.items() if k == "stage1_top_k"})
    with RANKING:
        ready = models().using(method, cross=crossing)
        ready.max_tokens = body.get("max_tokens_per_doc", 512)
        found = ready.rank(body["query"], body["documents"], body.get("top_n"))
    meta = {"method": method.name, "deployed_model_id": body["model"]} | ({"model_cross": body["model_cross"]} if crossing else {})
    meta |= {k: v for k, v in method.settings().items() if k == "stage1_top_k"}
    return {"results": [{"index": r.index, "relevance_score": r.relevance_score} for r in found], "meta": meta}


@dataclass
class StandIn:
    """The server.

    Attributes:
        url: http://127.0.0.1:PORT.
        asked: path, headers (names in lower case) and JSON of every request.
        replies: replies for the first requests, one each; None closes the connection without an answer.
        alter: changes each valid answer.
        pause: seconds before each answer.
        connections: number of connections that were opened.
        most: the most requests that were in progress at once.
    """

    url: str = ""
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    replies: list[Reply | None] = field(default_factory=list)
    alter: Callable[[dict[str, Any]], Any] = lambda answer: answer
    pause: float = 0.0
    connections: int = 0
    inside: int = 0
    most: int = 0

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.asked]


@contextmanager
def standing_in(port: int = 0) -> Iterator[StandIn]:
    """Runs a StandIn on this port, or on a free one, while the block runs."""
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def setup(self) -> None:
            stand_in.connections += 1
            super().setup()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stand_in.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            stand_in.inside += 1
            stand_in.most = max(stand_in.most, stand_in.inside)
            try:
                if stand_in.pause:
                    time.sleep(stand_in.pause)
                reply = stand_in.replies.pop(0) if stand_in.replies else ok(stand_in.alter(answer(body)))
            finally:
                stand_in.inside -= 1
            if reply is None:
                self.close_connection = True
                return
            self.send_response(reply[0])
            for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(reply[2]))} | reply[1]).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply[2])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        allow_reuse_address = daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:  # a client has left
            pass

    with Quiet(("127.0.0.1", port), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        stand_in.url = f"http://127.0.0.1:{http.server_port}"
        yield stand_in
        http.shutdown()


def ok(value: Any) -> Reply:
    """A reply with status 200. Bytes are sent as they are, other values as JSON."""
    return 200, {}, value if isinstance(value, bytes) else json.dumps(value).encode()


def error(status: int, detail: Any = "as the test wants it", **headers: str) -> Reply:
    """A reply that is no ranking."""
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps({"detail": detail}).encode()
