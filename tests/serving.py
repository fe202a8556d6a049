"""A real server process on a real port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

KEY = "a-key-for-tests"
ALIASES = {"bge-reranker-v2-m3": "all-MiniLM-L6-v2", "bge-reranker-cross-encoder": "minilm-cross"}


# Batches never end, and one query breaks the model.
STUCK = """
import threading
from rerank_lab.server import scheduler, service
scheduler.Scheduler._run = lambda self, batch: threading.Event().wait()
steps = service.Steps
def breaking(reranker, query, texts):
    if query == "dynamite":
        raise RuntimeError("broken on purpose")
    return steps(reranker, query, texts)
service.Steps = breaking
"""


@dataclass
class Server:
    """A running server.

    Attributes:
        url: http://127.0.0.1:PORT.
        process: the server's process.
        log: file with its stderr.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, body: Any, path: str = "/api/v3/inference/reranker", key: str | None = KEY, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """POSTs a body: bytes as they are, other values as JSON. Returns status, JSON and headers (names in lower case) of the answer."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        given = {"Content-Type": "application/json", **headers} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        return self._ask(urllib.request.Request(self.url + path, data, given))

    def get(self, path: str) -> tuple[int, Any, dict[str, str]]:
        """Like `post` for a GET. An answer that is not JSON comes as text."""
        return self.send("GET", path)

    def send(self, method: str, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Like `get` for any request without a body. An answer without a body comes as None."""
        return self._ask(urllib.request.Request(self.url + path, method=method, headers=headers))

    def metric(self, name: str) -> float:
        """The value of a metric; its name includes the labels."""
        line = next(line for line in self.get("/metrics")[1].splitlines() if line.startswith(f"{name} "))
        return float(line.rpartition(" ")[2])

    def _ask(self, request: urllib.request.Request) -> tuple[int, Any, dict[str, str]]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, body, headers = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            status, body, headers = error.code, error.read(), error.headers
        found = {name.lower(): value for name, value in headers.items()}
        read = None if not body else orjson.loads(body) if "json" in found.get("content-type", "") else body.decode(errors="replace")
        return status, read, found


@contextmanager
def serving(*flags: str, wait: bool = True, code: str = "", env: dict[str, str] | None = None) -> Iterator[Server]:
    """Runs a server with these flags on a free port while the block runs.

    Args:
        flags: flags of python -m rerank_lab.server.
        wait: whether to wait until it is ready.
        code: Python code that the process runs before the server, for example to break a model.
        env: additional environment variables.
    """
    log = Path(tempfile.mkdtemp()) / "server.log"
    start = f"{code}\nimport sys; from rerank_lab.server.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "--port", "0", "--threads", "1", "--device", "cpu", *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=os.environ | {"RERANK_LAB_API_KEYS": KEY} | (env or {}))
    try:
        found = _wait_for(r"rerank_lab (http://\S+?)/", log, process)
        server = Server(found.group(1), process, log)
        if wait:
            _wait_for(r"ready: ", log, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> re.Match[str]:
    for _ in range(600):
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"the server never said {pattern!r}: {log.read_text(errors='replace')}")


def eventually(reached: Callable[[], bool], seconds: float = 10) -> None:
    """Waits until a condition is true."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.02)
