"""python -m rerank_lab.replay: recorded requests to two servers, and where their answers differ."""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import re
import statistics
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rerank_lab import cli
from rerank_lab.answers import KINDS, Answer, Difference, compare
from rerank_lab.endpoint import KEY, TIMEOUT, V3, NoAnswer, Server, check_address, key_from
from rerank_lab.errors import ModelError, UserError
from rerank_lab.options import count, path_of, positive, weight
from rerank_lab.run import write_atomically

log = logging.getLogger("rerank_lab")
SCHEMA = 1
EPILOG = f"""\
A line of REQUESTS.jsonl is the body of a request to {V3}:
  {{"model": "all-MiniLM-L6-v2", "query": "…", "documents": ["…", "…"]}}
or a body and the path that it goes to:
  {{"path": "/v1/rerank", "body": {{"query": "…", "documents": ["…", "…"]}}}}

examples:
  python -m rerank_lab.replay requests.jsonl http://a:8000 http://b:8000
      each request to both; where do the answers differ
  python -m rerank_lab.replay requests.jsonl https://api.example.com \\
      http://127.0.0.1:8000 --limit 100 --tolerance 1e-3 --json out.json
      a looser look at the first 100, the differences for a machine too
  python -m rerank_lab.replay requests.jsonl http://a:8000 http://a:8000
      does a server give the same answer twice

what may differ:
  order      at some rank stands another document
  score      of a document, by more than --tolerance
  status     of HTTP; then nothing else is compared
  shape      keys that one answer lacks, or what the body of an error looks like
  set        documents that one ranked and the other did not
  value      in meta, or in a document that is echoed
  no answer  from one of them, or from both

keys: $RERANK_LAB_ENDPOINT_KEY_A and $RERANK_LAB_ENDPOINT_KEY_B, each else
$RERANK_LAB_ENDPOINT_KEY, sent as Authorization: Bearer

exit codes: 0 all the same, 1 differences or a server that does not answer,
2 wrong input, 130 interrupted (what was compared is printed)
"""


@dataclass(frozen=True)
class Recorded:
    """A request: the line of the file that holds it, where it goes, its JSON."""

    line: int
    path: str
    body: Any


@dataclass(frozen=True)
class Compared:
    """One request with both answers: what differs, and how far the rankings agree (empty where one has none)."""

    request: Recorded
    a: Answer
    b: Answer
    found: list[Difference]
    agreed: dict[str, float | None]


def parser() -> argparse.ArgumentParser:
    """Every option with its default."""
    p = argparse.ArgumentParser(
        prog="python -m rerank_lab.replay",
        description="Sends recorded requests to two servers and prints where their answers differ.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("requests", type=path_of, metavar="REQUESTS.jsonl", help="one request a line; blank lines are skipped")
    p.add_argument("a", metavar="URL_A", help="http(s)://host:port, with a path where the server stands behind one")
    p.add_argument("b", metavar="URL_B", help="the same of the other")
    p.add_argument("--tolerance", type=weight, default=1e-4, metavar="X", help="absolute difference up to which scores are the same (default: 1e-4)")
    p.add_argument("--concurrency", type=count, default=1, metavar="N", help="requests at a time (default: 1, which is how to compare latency)")
    p.add_argument("--limit", type=count, metavar="N", help="the first N requests only")
    p.add_argument("--timeout", type=positive, default=TIMEOUT, metavar="S", help=f"without a byte, then it is no answer (default: {TIMEOUT:g})")
    p.add_argument("--json", type=path_of, metavar="FILE", help="summary and differences, for machines")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("rerank_lab: %(message)s"))
    log.addHandler(handler)
    done: list[Compared] = []
    try:
        requests = read_requests(options.requests)[: options.limit]
        urls = [check_address(url, name) for name, url in (("URL_A", options.a), ("URL_B", options.b))]
        if options.json is not None and not (options.json.parent.is_dir() and os.access(options.json.parent, os.W_OK) and not options.json.is_dir()):
            raise UserError(f"--json {options.json} cannot be written: name a file in a folder that is there")
        interrupted = False
        with ExitStack() as connections:
            a, b = (connections.enter_context(closing(Server(url, key_from(f"{KEY}_{x}", KEY), timeout=options.timeout))) for x, url in zip("AB", urls))
            try:
                done.extend(tqdm(replay(requests, a, b, options.tolerance, options.concurrency), total=len(requests), unit="request", disable=None))
            except KeyboardInterrupt:
                interrupted = True
        done.sort(key=lambda one: one.request.line)
        summary = summarize(done)
        if options.json is not None:
            about = {"schema": SCHEMA, "a": urls[0], "b": urls[1], "tolerance": options.tolerance, "recorded": len(requests), "interrupted": interrupted}
            write_atomically(options.json, json.dumps(about | summary | {"differences": differences(done)}, indent=1) + "\n")
        print(report(done, summary, options.requests, urls))
        if interrupted:
            print(f"\nrerank_lab: interrupted after {len(done)} of {len(requests)} requests", file=sys.stderr)
            return 130
        return int(summary["same"] < len(requests))
    except UserError as error:
        print(f"rerank_lab: error: {error}", file=sys.stderr)
        return 2
    except (ModelError, OSError) as error:
        print(f"rerank_lab: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrerank_lab: interrupted", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)


def read_requests(path: Path) -> list[Recorded]:
    """The requests of a file, in order.

    Raises:
        UserError: no such file, no request in it, or a line that is none, with file and line.
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
        found.append(Recorded(number, goes_to, request.get("body", request)))
    if not found:
        raise UserError(f"{path}: no requests; one a line, such as " + '{"model": "all-MiniLM-L6-v2", "query": "…", "documents": ["…"]}')
    return found


def replay(requests: Sequence[Recorded], a: Server, b: Server, tolerance: float, concurrency: int) -> Iterator[Compared]:
    """Sends each request to both servers, one after the other, and compares, in the order in which the answers come.

    B is asked first for every second request, so that neither always meets what the other has warmed.

    Raises:
        NoAnswer: nothing came back from a server that has never answered.
    """
    waiting: queue.SimpleQueue[tuple[int, Recorded]] = queue.SimpleQueue()
    results: queue.SimpleQueue[Compared | BaseException] = queue.SimpleQueue()
    for numbered in enumerate(requests):
        waiting.put(numbered)
    answered: set[str] = set()

    def ask(server: Server, name: str, request: Recorded) -> Answer:
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
                    results.put(Compared(request, answers["A"], answers["B"], *compare(answers["A"], answers["B"], tolerance)))
                except BaseException as error:  # noqa: BLE001 - raised where the results are read, which ends the run
                    results.put(error)
                    return

    # Threads that no one waits for: an interrupted run ends at once, whatever a server is about.
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


def summarize(done: Sequence[Compared]) -> dict[str, Any]:
    """Counts, medians of the agreement, and latency in ms of what was compared."""
    kinds = [{kind for kind, _ in one.found} for one in done]
    agreed = {name: [v for one in done if (v := one.agreed.get(name)) is not None] for name in ("kendall_tau", "overlap@10")}
    result: dict[str, Any] = {
        "compared": len(done),
        "same": sum(not found for found in kinds),
        "differing": {kind: sum(kind in found for found in kinds) for kind in KINDS},
        "rankings": sum(bool(one.agreed) for one in done),
    }
    result |= {f"{name}_median": statistics.median(values) if values else None for name, values in agreed.items()}
    for name in ("a", "b"):
        times = [1000 * x.seconds for one in done if (x := getattr(one, name)).status is not None]
        result[f"latency_ms_{name}"] = dict(zip(("p50", "p95"), np.percentile(times, [50, 95]).tolist())) if times else None
        result[f"statuses_{name}"] = dict(Counter(str(getattr(one, name).status or "no answer") for one in done))
    return result


def differences(done: Iterable[Compared]) -> list[dict[str, Any]]:
    """What differs, one entry a request, for machines."""
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


def report(done: Sequence[Compared], summary: dict[str, Any], path: Path, urls: Sequence[str]) -> str:
    """The differences and the summary, for a terminal."""
    lines = []
    for one in done:
        if one.found:
            lines.append(f"{path}:{one.request.line} POST {one.request.path}")
            for kind, text in one.found:
                lines += textwrap.wrap(f"{kind}: {text}", 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    differing = ", ".join(f"{kind} {n}" for kind, n in summary["differing"].items() if n or kind in KINDS[:4])
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


if __name__ == "__main__":
    sys.exit(cli.run(main))
