"""Recorded requests: reads them, sends them to two servers, and reports where the answers differ."""

from __future__ import annotations

import json
import queue
import re
import statistics
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rerank_lab.client.endpoint import NoAnswer, RemoteServer
from rerank_lab.client.v3 import V3
from rerank_lab.errors import UserError
from rerank_lab.replay.answers import DIFFERENCE_KINDS, Answer, Difference, compare


@dataclass(frozen=True)
class RecordedRequest:
    """A request: its line in the file, the path that it goes to, and its JSON."""

    line: int
    path: str
    body: Any


@dataclass(frozen=True)
class ComparedRequest:
    """One request with both answers.

    Attributes:
        request: the request.
        a, b: the answers.
        found: the differences between them.
        agreed: how far the rankings agree (stats.agreement); empty if an answer has no ranking.
    """

    request: RecordedRequest
    a: Answer
    b: Answer
    found: list[Difference]
    agreed: dict[str, float | None]


def read_requests(path: Path) -> list[RecordedRequest]:
    """Reads the requests of a file, in order.

    Raises:
        UserError: the file does not exist or has no requests, or a line is not a request. The message names file and line.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: no JSON ({error})") from None
        if not isinstance(request, dict):
            raise UserError(f"{where}: a request is an object, the body itself or one with it under 'body', not {textwrap.shorten(repr(request), 40)}")
        goes_to = request.get("path", V3)
        if not isinstance(goes_to, str) or not re.fullmatch(r"/[!-~]*", goes_to):
            raise UserError(f"{where}: path {goes_to!r} is none; write it as in /v1/rerank")
        if "path" in request and "body" not in request:
            raise UserError(f"{where}: a path without a body: put the request's JSON under 'body'")
        found.append(RecordedRequest(number, goes_to, request.get("body", request)))
    if not found:
        raise UserError(f"{path}: no requests; one a line, such as " + '{"model": "all-MiniLM-L6-v2", "query": "…", "documents": ["…"]}')
    return found


def replay(requests: Sequence[RecordedRequest], a: RemoteServer, b: RemoteServer, tolerance: float, concurrency: int) -> Iterator[ComparedRequest]:
    """Sends each request to both servers, one after the other, and compares the answers. Yields in the order in which answers come.

    Every second request goes to B first, so that no server always profits from caches that the other has warmed.

    Args:
        requests: in the order in which they are sent.
        a, b: the servers.
        tolerance: absolute difference up to which two scores are the same.
        concurrency: how many requests are under way at a time.

    Raises:
        NoAnswer: no answer came from a server that has never answered before.
    """
    waiting: queue.SimpleQueue[tuple[int, RecordedRequest]] = queue.SimpleQueue()
    results: queue.SimpleQueue[ComparedRequest | BaseException] = queue.SimpleQueue()
    for numbered in enumerate(requests):
        waiting.put(numbered)
    answered: set[str] = set()

    def ask(server: RemoteServer, name: str, request: RecordedRequest) -> Answer:
        start = time.perf_counter()
        try:
            answer = server.post(request.path, request.body)
        except UserError as error:
            raise UserError(f"line {request.line}: {error}") from None
        except NoAnswer as error:
            if name not in answered:
                raise
            return Answer(None, str(error), time.perf_counter() - start)
        answered.add(name)
        return Answer(answer.status_code, server.body(answer), time.perf_counter() - start)

    def work() -> None:
        with suppress(queue.Empty):
            while True:
                number, request = waiting.get_nowait()
                try:
                    turns = [("A", a), ("B", b)]
                    answers = {name: ask(server, name, request) for name, server in (turns[::-1] if number % 2 else turns)}
                    results.put(ComparedRequest(request, answers["A"], answers["B"], *compare(answers["A"], answers["B"], tolerance)))
                except BaseException as error:  # noqa: BLE001 - raised where the results are read, which ends the run
                    results.put(error)
                    return

    # Daemon threads, so that an interrupted run ends at once and waits for no server.
    for _ in range(min(concurrency, len(requests))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in requests:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()


def summarize(done: Sequence[ComparedRequest]) -> dict[str, Any]:
    """The summary: counts, medians of the agreement, and latencies in ms."""
    kinds = [{kind for kind, _ in one.found} for one in done]
    agreed = {name: [v for one in done if (v := one.agreed.get(name)) is not None] for name in ("kendall_tau", "overlap@10")}
    result: dict[str, Any] = {
        "compared": len(done),
        "same": sum(not found for found in kinds),
        "differing": {kind: sum(kind in found for found in kinds) for kind in DIFFERENCE_KINDS},
        "rankings": sum(bool(one.agreed) for one in done),
    }
    result |= {f"{name}_median": statistics.median(values) if values else None for name, values in agreed.items()}
    for name in ("a", "b"):
        times = [1000 * x.seconds for one in done if (x := getattr(one, name)).status is not None]
        result[f"latency_ms_{name}"] = dict(zip(("p50", "p95"), np.percentile(times, [50, 95]).tolist())) if times else None
        result[f"statuses_{name}"] = dict(Counter(str(getattr(one, name).status or "no answer") for one in done))
    return result


def differences(done: Iterable[ComparedRequest]) -> list[dict[str, Any]]:
    """The differences as JSON, one entry for each request that has some."""
    return [
        {
            "line": one.request.line,
            "path": one.request.path,
            "status": {"a": one.a.status, "b": one.b.status},
            "differences": [{"kind": kind, "text": text} for kind, text in one.found],
            "agreement": one.agreed or None,
            "latency_ms": {"a": 1000 * one.a.seconds, "b": 1000 * one.b.seconds},
        }
        for one in done
        if one.found
    ]


def report(done: Sequence[ComparedRequest], summary: dict[str, Any], path: Path, urls: Sequence[str]) -> str:
    """The differences and the summary as text for a terminal."""
    lines = []
    for one in done:
        if one.found:
            lines.append(f"{path}:{one.request.line} POST {one.request.path}")
            for kind, text in one.found:
                lines += textwrap.wrap(f"{kind}: {text}", 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    differing = ", ".join(f"{kind} {n}" for kind, n in summary["differing"].items() if n or kind in DIFFERENCE_KINDS[:4])
    medians = [summary[f"{name}_median"] for name in ("kendall_tau", "overlap@10")]
    tau, overlap = ("undefined" if m is None else f"{m:.4f}" for m in medians)
    lines += [""] if lines else []
    lines += [f"{summary['compared']} {'request' if summary['compared'] == 1 else 'requests'}, {summary['same']} same; differing in {differing}"]
    lines += [f"medians over {summary['rankings']} rankings: Kendall's tau {tau}, overlap at 10 {overlap}", f"{'':5}{'p50 ms':>10}{'p95 ms':>10}"]
    for name, url in zip("AB", urls):
        latency, statuses = summary[f"latency_ms_{name.lower()}"], summary[f"statuses_{name.lower()}"]
        times = [f"{latency[q]:,.1f}" if latency else "-" for q in ("p50", "p95")]
        lines.append(f"{name:<5}{times[0]:>10}{times[1]:>10}  {url}: {', '.join(f'{n} x {status}' for status, n in statuses.items())}")
    return "\n".join(lines)
