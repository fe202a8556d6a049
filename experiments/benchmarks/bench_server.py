"""python experiments/benchmarks/bench_server.py --infinity VENV/bin/python: the endpoint under load

Each request holds 20 short documents and a query of --dataset. New: before each
document stands a mark that no request had before, and a classifier on the default
backbone reads every pair, the same folder for our server and for infinity. Seen:
the documents are drawn from 400 that were sent before the clock runs; infinity
keeps nothing of a document, so its rate on new ones stands for these too.

Servers run alone: ours, infinity, ours, infinity. Closed loop: so many clients,
each with one request at a time; the clock starts when each has had an answer.
Open loop: Poisson arrivals at 50% and 80% of our rate at 8 clients, each timed from
when it was due. Figures are medians over rounds. Times of one run on a shared
machine, the load's own work included: read the ratios.

out: at one client, the share of a request's time in the server that is not the
model's (Server-Timing); at more, the share of the stretch in which no batch ran.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench_models import classifier
from rerank_lab.cli import count, non_negative, path_of
from rerank_lab.client.v3 import V3
from rerank_lab.datasets import Dataset, load_dataset
from rerank_lab.environment import describe
from rerank_lab.errors import UserError
from rerank_lab.reranker import Reranker

CLIENTS, SHARES, METHODS = (1, 8, 64), (0.5, 0.8), ("fast", "best", "standard")
DOCUMENTS, WORDS, SEEN, LIMIT = 20, 20, 400, 256  # documents of a request; words of a document; documents sent before; tokens of a pair
TIMING = re.compile(r"model;dur=([\d.]+).*total;dur=([\d.]+)")
INFINITY = "--engine torch --device cpu --dtype float32 --no-bettertransformer --no-compile --log-level error --served-model-name classifier"
QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
EPILOG = """\
examples:
  python -m venv VENV && VENV/bin/pip install 'infinity-emb[torch,server]==0.0.78'
  python experiments/benchmarks/bench_server.py --infinity VENV/bin/python
      everything, in less than eight minutes
  python experiments/benchmarks/bench_server.py --seconds 2 --rounds 1
      a quick look at our server alone

exit codes: 0 done, 1 a server failed or refused, 2 wrong input
"""
LoadFigures = dict[str, float]
Rows = dict[tuple[str, str, str], list[LoadFigures]]  # documents, name, load → a row for each round


class ServerFailed(Exception):
    """A server did not start, or answered with a status other than 200."""


class RequestTexts:
    """Draws queries, shortened documents and arrival times. The same seed gives the same ones in the same order."""

    def __init__(self, dataset: Dataset, seed: int):
        self.random, self.arrivals, self.queries = random.Random(seed), random.Random(seed), list(dataset.queries.values())
        self.texts = [" ".join(text.split()[:WORDS]) for text in dataset.corpus.values()]
        self.seen = [self._new() for _ in range(SEEN)]

    def draw(self, seen: bool) -> tuple[str, list[str]]:
        return self.random.choice(self.queries), self.random.sample(self.seen, DOCUMENTS) if seen else [self._new() for _ in range(DOCUMENTS)]

    def _new(self) -> str:
        return f"{self.random.getrandbits(32):08x} {self.random.choice(self.texts)}"


@dataclass
class RequestKind:
    """One kind of request to one server. It uses keep-alive connections, and no more of HTTP than both servers need.

    Attributes:
        port: of the server.
        path: of the requests.
        fixed: their JSON, without query and documents.
        texts: draws queries and documents.
        seen: whether the documents were sent before.
        local: ranks the same in this process, to find the cost of HTTP; None: not measured.
        answers: for each answer, the time when it came, the ms that it took, and its head.
        idle: open connections that no request uses.
    """

    port: int
    path: str
    fixed: Mapping[str, object]
    texts: RequestTexts
    seen: bool = False
    local: Reranker | None = None
    answers: list[tuple[float, float, str]] = field(default_factory=list)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def send(self, pool: tuple[str, list[str]] | None = None, due: float | None = None) -> bytes:
        """Sends a request with this pool, or with a drawn one. Its time counts from `due`, or from now. Returns the answer's body."""
        query, documents = pool or self.texts.draw(self.seen)
        body, start = json.dumps({**self.fixed, "query": query, "documents": documents}).encode(), due or time.perf_counter()
        head, answer = await self.ask(f"POST {self.path}", body)
        self.answers.append((end := time.perf_counter(), 1000 * (end - start), head))
        return answer

    async def ask(self, what: str, body: bytes = b"") -> tuple[str, bytes]:
        """Sends a request. Returns head and body of the answer. If the server has just closed an idle connection, it is sent again.

        Raises:
            ServerFailed: the status is not 200.
        """
        while True:
            self.idle = [pair for pair in self.idle if not pair[0].at_eof()]
            waited = bool(self.idle)
            reader, writer = self.idle.pop() if waited else await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(f"{what} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = re.search(r"\r\ncontent-length: *(\d+)", head)
                answer = await reader.readexactly(int(length[1]) if length else 0)
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                if not waited:
                    raise
                continue
            except BaseException:  # also if the task is cancelled
                writer.close()
                raise
            if head.split(" ", 2)[1] != "200":
                raise ServerFailed(f"{what}: {head.splitlines()[0]} {answer[:300].decode(errors='replace')}")
            self.idle.append((reader, writer))
            return head, answer

    async def busy(self) -> float:
        """Seconds in which our server has run batches so far; NaN for another server."""
        found = re.search(r"^rerank_lab_model_seconds_total (\S+)$", (await self.ask("GET /metrics"))[1].decode(), re.MULTILINE)
        return float(found[1]) if found else math.nan

    def figures(self, start: float, end: float, cpu: float) -> LoadFigures:
        """Figures between two points in time: requests per second, latencies in ms, and the share of a core that this client took."""
        took = [taken for at, taken, _ in self.answers if start < at <= end]
        quantiles = np.percentile(took or [math.nan], [50, 95, 99]).tolist()
        return dict(zip(("p50", "p95", "p99"), quantiles)) | {"rate": len(took) / (end - start), "client": cpu / (end - start), "out": math.nan}

    async def closed(self, clients: int, seconds: float) -> LoadFigures:
        """Runs this many clients, each with one request at a time, and measures for so many seconds."""
        unmet, running = set(range(clients)), True

        async def client(number: int) -> None:
            while running:
                await self.send()
                unmet.discard(number)

        self.answers = []
        tasks = [asyncio.create_task(client(i)) for i in range(clients)]
        while unmet and not any(task.done() for task in tasks):  # a client that ends has failed
            await asyncio.sleep(0.01)
        before, cpu, start = await self.busy(), time.process_time(), time.perf_counter()
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        end, cpu, after, running = time.perf_counter(), time.process_time() - cpu, await self.busy(), False
        for task in tasks if clients == CLIENTS[-1] else ():  # this is the last load, and emptying its queue would take long
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(error, Exception):
                raise error
        last = max((at for at, _, _ in self.answers if start < at <= end), default=end)  # answers come in bursts, so the clock stops at the last one
        row, timings = self.figures(start, last, cpu), [(float(model), float(total)) for _, _, head in self.answers for model, total in TIMING.findall(head)]
        model, total = map(sum, zip(*timings)) if clients == 1 and timings else (after - before, end - start)
        return row | {"out": max(1 - model / total, 0.0)}  # this order of arguments keeps NaN

    async def opened(self, rate: float, seconds: float) -> LoadFigures:
        """Sends requests at Poisson arrivals, without waiting for answers, and measures."""
        self.answers, tasks, cpu = [], [], time.process_time()
        start = due = time.perf_counter()
        while due < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.send(due=due)))
            due += self.texts.arrivals.expovariate(rate)
        await asyncio.gather(*tasks)
        return self.figures(start, time.perf_counter(), time.process_time() - cpu) | {"out": math.nan}

    async def overhead(self, local: Reranker, seconds: float) -> LoadFigures:
        """Median ms of a request and of Reranker.rank on the same documents; the two alternate."""
        taken: list[float] = []
        await self.send()  # waits until the queue of an earlier load is empty
        end, self.answers = time.perf_counter() + seconds, []
        while len(taken) < 2 or time.perf_counter() < end:
            pool = self.texts.draw(self.seen)
            for remote in (True, False) if len(taken) % 2 else (False, True):
                await asyncio.sleep(0.005)  # lets the other process's threads stop spinning
                start = time.perf_counter()
                if remote:
                    await self.send(pool)
                else:
                    local.rank(*pool)
                    taken.append(1000 * (time.perf_counter() - start))
        return {"http": median(took for _, took, _ in self.answers), "rank": median(taken)}


async def measure(cases: dict[tuple[str, str], RequestKind], seconds: float, rows: Rows, bar: tqdm) -> list[float]:
    """Puts every load on one server and adds the figures to `rows`. Returns the scores of the first request, by index."""
    found = json.loads(await next(iter(cases.values())).send())["results"]
    for (documents, name), case in cases.items():
        for start in range(0, SEEN if case.seen else 0, DOCUMENTS):
            pool = case.texts.queries[0], case.texts.seen[start : start + DOCUMENTS]
            await case.send(pool)
            if case.local is not None:
                case.local.rank(*pool)
        await case.closed(CLIENTS[1], 0.5)
        length = seconds / 2 if case.seen else seconds
        for load in (*CLIENTS[:-1], *(() if case.seen else SHARES), CLIENTS[-1]):
            if load in CLIENTS:
                row = await case.closed(int(load), length)
            else:
                row = await case.opened(max(0.1, load * rows["new", "ours", f"{CLIENTS[1]}"][-1]["rate"]), length)
            rows[documents, name, f"{load:g}"].append(row)
            bar.update()
        if case.local is not None:
            rows[documents, name, "overhead"].append(await case.overhead(case.local, length))
            bar.update()
    return [float(result["relevance_score"]) for result in sorted(found, key=lambda result: int(result["index"]))]


@contextmanager
def serving(command: Sequence[str], ready: str, folder: Path, threads: int) -> Iterator[int]:
    """Runs a server in a folder while the block runs, and gives its port when `ready` answers 200. The folder has its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    with (folder / "server.log").open("wb") as log:
        own = os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], cwd=folder, stdout=log, stderr=log, env=own)
    try:
        end, state = time.monotonic() + 180, 0
        while state != 200:
            if process.poll() is not None or time.monotonic() > end:
                raise ServerFailed(f"{' '.join(command[:3])} did not get ready:\n{(folder / 'server.log').read_text(errors='replace')[-1500:]}")
            time.sleep(0.2)
            with suppress(OSError):
                state = urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).status
        yield port
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def report(rows: Rows) -> Iterator[str]:
    """Lines of the report: two tables of at most 80 columns, the ratios, and the cost of HTTP."""
    of = {key: {name: median(row[name] for row in group) for name in group[0]} for key, group in rows.items()}
    for documents in ("new", "seen"):
        yield f"\n{documents + ' docs':<8} | load |  req/s | pairs/s |    p50 |    p95 |    p99 |  out | x inf"
        yield "---------|-----:|-------:|--------:|-------:|-------:|-------:|-----:|-----:"
        for (kind, name, load), row in of.items():
            if kind == documents and load != "overhead":
                base = of.get(("new", "infinity", load)) if load.isdecimal() else None
                times = " | ".join(f"{row[p]:6.1f}" if row[p] < 1e4 else f"{row[p]:6.0f}" for p in ("p50", "p95", "p99"))
                out, ratio = "-" if math.isnan(row["out"]) else f"{row['out']:.0%}", f"{row['rate'] / base['rate']:.2f}" if base else "-"
                yield f"{name:<8} | {load:>4} | {row['rate']:6.1f} | {DOCUMENTS * row['rate']:7,.0f} | {times} | {out:>4} | {ratio:>5}"
    yield f"\nload: clients, or arrivals as a share of our rate at 8; {max(row.get('client', 0.0) for row in of.values()):.0%} of a core at most"
    if ratios := [f"{of['new', 'ours', load]['p95'] / row['p95']:.2f} at {load}" for (_, name, load), row in of.items() if name == "infinity"]:
        yield f"p95, x infinity's: {', '.join(ratios)}"
    for (documents, name, load), group in rows.items():
        if load == "overhead":
            row, more = of[documents, name, load], median(row["http"] - row["rank"] for row in group)
            yield f"p50 of {name}, {documents} documents: {row['http']:.2f} ms by HTTP, {row['rank']:.2f} in process, {more:+.2f}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python experiments/benchmarks/bench_server.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--infinity", type=path_of, metavar="PYTHON", help="of the venv that holds infinity-emb (default: our server alone)")
    p.add_argument("--dataset", default="numpydoc", help="bundled name or BEIR folder (default: numpydoc)")
    p.add_argument("--rounds", type=count, default=2, metavar="N", help="starts of each server (default: 2)")
    p.add_argument("--seconds", type=non_negative, default=5.0, metavar="S", help="of a load of new documents; of seen ones half as many (default: 5)")
    p.add_argument("--threads", type=count, default=torch.get_num_threads(), metavar="N", help="of each server (default: torch's choice)")
    return p


def version(python: str) -> str:
    """Versions of infinity and of its torch."""
    ask = "from importlib.metadata import version as v; import infinity_emb; print(v('infinity-emb'), 'on torch', v('torch'))"
    try:
        return subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True, env=os.environ | QUIET).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--infinity {python} is no Python that imports infinity_emb: {error}") from None


def run(options: argparse.Namespace, folder: Path) -> str:
    torch.set_num_threads(options.threads)
    machine, dataset, peer = describe(torch.device("cpu")), load_dataset(options.dataset), str(options.infinity.absolute()) if options.infinity else ""
    head = f"{machine.cpu}, {options.threads} threads a server, torch {machine.packages['torch']}" + (f", infinity {version(peer)}" if peer else "")
    model, rows, apart = str(classifier(folder / "classifier", LIMIT)), defaultdict[tuple[str, str, str], list[LoadFigures]](list), 0.0
    fast, cross = Reranker(method="fast", device="cpu"), Reranker(None, "standard", model, device="cpu")
    ours = [sys.executable, "-m", "rerank_lab.server", "--no-auth", "--device", "cpu", "--threads", str(options.threads), "--model-cross", model]
    theirs = [peer, "-m", "infinity_emb.cli", "v2", "--model-id", model, *INFINITY.split()]
    with tqdm(desc="loads", total=options.rounds * (21 if peer else 16), disable=None) as bar:
        for turn in range(options.rounds):
            with serving(ours, "/ready", folder, options.threads) as port:
                texts, named = RequestTexts(dataset, turn), {"model": "all-MiniLM-L6-v2", "method": "standard", "model_cross": "minilm-cross"}
                cases = {("new", "ours"): RequestKind(port, V3, named | {"model_cross": model}, texts, local=cross)}
                for method in METHODS:
                    body = {"model": "all-MiniLM-L6-v2", "method": method} if method != "standard" else named
                    cases["seen", method] = RequestKind(port, V3, body, texts, seen=True, local=fast if method == "fast" else None)
                scores = asyncio.run(measure(cases, options.seconds, rows, bar))
            if peer:
                with serving(theirs, "/health", folder, options.threads) as port:
                    cases = {("new", "infinity"): RequestKind(port, "/rerank", {"model": "classifier", "return_documents": False}, RequestTexts(dataset, turn))}
                    found = asyncio.run(measure(cases, options.seconds, rows, bar))
                apart = max(apart, *(abs(a - b) for a, b in zip(scores, found)))
    if apart > 1e-4:
        raise ServerFailed(f"the servers do not do the same: their scores of one request differ by {apart:.4f}")
    tokenizer, texts = Tokenizer.from_file(f"{model}/tokenizer.json"), RequestTexts(dataset, 0)
    tokenizer.no_padding()
    tokens = fmean(len(tokenizer.encode(query, text).ids) for query, pool in (texts.draw(False) for _ in range(50)) for text in pool)
    head += f"; {DOCUMENTS} documents a request, {tokens:.0f} tokens a pair; medians over --rounds {options.rounds}, --seconds {options.seconds:g}; times in ms"
    return "\n".join([*textwrap.wrap(head, 80), *report(rows), *([f"scores of one request: within {apart:.0e} of infinity's"] if peer else [])])


def main() -> int:
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped too
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(run(options, Path(folder)))
    except (UserError, ServerFailed, OSError, EOFError) as error:
        print(f"bench_server: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
