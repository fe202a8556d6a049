"""Other libraries that `bench` compares with, each in a process of its own, since one may crash."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from .bench_tasks import Call, Task

# name in the report → distribution, module
PEERS = {
    "maxsim-cpu": ("maxsim-cpu", "maxsim_cpu"),
    "fast-maxsim": ("fast-maxsim", "fast_maxsim"),
    "faiss IndexFlatIP": ("faiss-cpu", "faiss"),
    "faiss, BLAS threshold 20": ("faiss-cpu", "faiss"),
    "late-interaction-kernels": ("late-interaction-kernels", "late_interaction_kernels"),
    "flash-maxsim": ("flash-maxsim", "flash_maxsim"),
}


def missing(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    distribution, module = PEERS[name]
    return None if importlib.util.find_spec(module) else f"not installed (pip install {distribution})"


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    return {distribution: version(distribution) for distribution, module in PEERS.values() if importlib.util.find_spec(module)}


def seconds(call: Call) -> float:
    """Wall-clock time of a second call after a first: processors and threads that slept since the last contender are awake then."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _serve(pipe: Connection, name: str, task: Task, threads: int) -> None:
    """The peer's process. It sends its result first, then the seconds of one call for every True that it receives."""
    os.environ.update(RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
    torch.set_num_threads(threads)
    try:
        call = task.peer(name, importlib.import_module(PEERS[name][1]), threads)
        pipe.send(np.asarray(call()))
    except BaseException as problem:  # noqa: BLE001 — a Rust panic is no Exception
        pipe.send(f"{type(problem).__name__}: {problem}")
        return
    while pipe.recv():
        pipe.send(seconds(call))


class Remote:
    """A peer in a process of its own.

    Attributes:
        result: of its first call; None where there is none.
        problem: why there are no times of it, or None.
    """

    def __init__(self, name: str, task: Task, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, name, task, threads), daemon=True)
        self.process.start()
        other.close()
        self.problem: str | None = None
        answer = self._answer()
        self.result = answer if isinstance(answer, np.ndarray) else None
        if isinstance(answer, str):
            self.problem = answer

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            self.problem = self.problem or f"crashes (exit status {self.process.exitcode})"

    def seconds(self) -> float:
        """Time of one call, measured in its process; NaN once it has crashed."""
        try:
            self.pipe.send(True)
        except OSError:
            pass
        answer = self._answer()
        return answer if isinstance(answer, float) else float("nan")

    def close(self) -> None:
        """Ends the process."""
        try:
            self.pipe.send(False)
        except OSError:
            pass
        self.process.join(5)
        self.process.kill()
