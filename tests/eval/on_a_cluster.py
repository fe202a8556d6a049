"""Helpers for tests of the Ray executor: find and kill processes by name, compare results folders."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd

ENCODING, RANKING = "ray::MapWorker", "ray::Worker"


def processes(ancestor: int) -> dict[int, str]:
    """Process id → command line, of every descendant of a process."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            names[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ").strip()
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])

    def below(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    return {pid: name for pid, name in names.items() if pid != ancestor and below(pid)}


def workers(kind: str, ancestor: int | None = None) -> list[int]:
    """Ids of the cluster's processes whose names begin with `kind`."""
    return sorted(pid for pid, name in processes(ancestor or os.getpid()).items() if name.startswith(kind))


@contextmanager
def killing(kinds: list[str], seed: int, act: Callable[[int], None] = lambda pid: os.kill(pid, signal.SIGKILL), wait: float = 1.0) -> Iterator[list[str]]:
    """Kills workers, or does something else to them, while the block runs.

    Args:
        kinds: beginnings of process names; one worker of each is chosen, in this order.
        seed: of the random moments.
        act: what is done to a worker's process id.
        wait: the most seconds between a worker's start and the act.

    Yields:
        the kinds that have been dealt with so far.
    """
    done: list[str] = []
    stop, random = threading.Event(), Random(seed)

    def run() -> None:
        for kind in kinds:
            while not (found := workers(kind)):
                if stop.wait(0.05):
                    return
            if stop.wait(random.random() * wait):
                return
            with suppress(ProcessLookupError):
                act(random.choice(workers(kind) or found))
                done.append(kind)
            before = set(found)
            while set(workers(kind)) & before == before and not stop.wait(0.05):
                pass

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def load(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def assert_same_results(a: Path, b: Path) -> None:
    """Asserts that rankings are equal, measures agree to six digits, and every query is there once."""
    one, other = load(a), load(b)
    assert one["config"] == other["config"] and one["candidates"]["hash"] == other["candidates"]["hash"] and one["models"] == other["models"]
    for row, same in zip(one["rows"], other["rows"], strict=True):
        assert row["method"] == same["method"] and row["queries"] == same["queries"] == row["timed_queries"] == same["timed_queries"]
        assert {n: round(v, 6) for n, v in row["measures"].items()} == {n: round(v, 6) for n, v in same["measures"].items()}
    runs = sorted(path.name for path in (a / "runs").iterdir())
    assert runs == sorted(path.name for path in (b / "runs").iterdir())
    for name in runs:
        assert (a / "runs" / name).read_text() == (b / "runs" / name).read_text(), name
    scores, others = (pd.read_parquet(out / "scores.parquet") for out in (a, b))
    assert not scores.duplicated(["method", "query", "document"]).any()
    assert np.allclose(scores["score"], others["score"], rtol=0, atol=1e-5)


def ended(pids: list[int], seconds: float = 40.0) -> bool:
    """Waits until all of these processes are gone; a zombie counts as gone. Returns whether they are."""
    deadline = time.monotonic() + seconds

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    while time.monotonic() < deadline:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.2)
    return False


@contextmanager
def ftp_server(folder: Path) -> Iterator[str]:
    """The URL of a file server on a real port, for fsspec."""
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer

    folder.mkdir(parents=True, exist_ok=True)
    authorizer = DummyAuthorizer()
    authorizer.add_user("u", "p", str(folder), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    logging.getLogger("pyftpdlib").setLevel(logging.ERROR)
    server = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"handle_exit": False}, daemon=True)
    thread.start()
    try:
        yield f"ftp://u:p@127.0.0.1:{server.address[1]}"
    finally:
        server.close_all()
        thread.join(10)
