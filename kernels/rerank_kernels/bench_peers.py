"""What `bench` compares with: tensors made anew from a seed, so that a peer that may crash gets them in a process of its own."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

Call = Callable[[], Any]
# name in the table → distribution, module
PEERS = {
    "maxsim-cpu": ("maxsim-cpu", "maxsim_cpu"),
    "fast-maxsim": ("fast-maxsim", "fast_maxsim"),
    "faiss IndexFlatIP": ("faiss-cpu", "faiss"),
    "faiss, BLAS threshold 20": ("faiss-cpu", "faiss"),
    "late-interaction-kernels": ("late-interaction-kernels", "late_interaction_kernels"),
    "flash-maxsim": ("flash-maxsim", "flash_maxsim"),
}


@dataclass(frozen=True)
class Ragged:
    """One query of Lq tokens and documents of 20 to 300 tokens, unit vectors of width d."""

    d: int
    documents: int = 1000
    Lq: int = 32

    def tensors(self) -> dict[str, Tensor]:
        """q, q_offsets, tokens, d_offsets, pairs as subspace_attention takes them."""
        g = torch.Generator("cpu").manual_seed(self.d)
        ends = torch.randint(20, 301, (self.documents,), generator=g, dtype=torch.int64, device="cpu").cumsum(0)
        tokens, q = _unit(int(ends[-1]), self.d, g), _unit(self.Lq, self.d, g)
        places = torch.arange(self.documents, dtype=torch.int64, device="cpu")
        pairs, q_offsets = torch.stack([torch.zeros_like(places), places], 1), torch.tensor([0, self.Lq], dtype=torch.int64, device="cpu")
        return {"q": q, "q_offsets": q_offsets, "tokens": tokens, "d_offsets": torch.cat([ends.new_zeros(1), ends]), "pairs": pairs}


@dataclass(frozen=True)
class Search:
    """Queries against documents, unit vectors, the k best by dot product."""

    queries: int
    documents: int = 100_000
    d: int = 384
    k: int = 100

    def tensors(self) -> dict[str, Tensor]:
        """queries and documents as similarity_topk takes them."""
        g = torch.Generator("cpu").manual_seed(self.queries)
        sizes = {"queries": self.queries, "documents": self.documents}
        return {name: _unit(count, self.d, g) for name, count in sizes.items()}


def _unit(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu"), dim=-1)


def padded(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Documents of one length (N × longest × d), and which of their tokens are real."""
    lengths = x["d_offsets"].diff()
    mask = torch.arange(int(lengths.max()), dtype=torch.int64, device=lengths.device) < lengths[:, None]
    full = x["tokens"].new_zeros(*mask.shape, x["tokens"].shape[1])
    full[mask] = x["tokens"]
    return full, mask


def padded_maxsim(q: Tensor, full: Tensor, mask: Tensor) -> Tensor:
    """MaxSim as it is usually written: sums over the query's tokens, one a document."""
    return torch.einsum("id,njd->nij", q, full).masked_fill(~mask[:, None], -torch.inf).amax(2).sum(1)


def packed_maxsim(x: dict[str, Tensor], owner: Tensor) -> Tensor:
    """MaxSim in packed products of 8,192 tokens and a scattered maximum; owner: each token's document."""
    best = torch.full((len(x["pairs"]), len(x["q"])), -torch.inf, dtype=torch.float32, device="cpu")
    for start in range(0, len(owner), 8192):
        part = slice(start, start + 8192)
        best.scatter_reduce_(0, owner[part, None].expand(-1, len(x["q"])), x["tokens"][part] @ x["q"].T, "amax")
    return best.sum(1)


def numpy_topk(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """Values of the k best: product, argpartition, sort."""
    s = queries @ documents.T
    some = np.take_along_axis(s, np.argpartition(s, s.shape[1] - k, 1)[:, -k:], 1)
    return -np.sort(-some, 1)


def missing(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    distribution, module = PEERS[name]
    return None if importlib.util.find_spec(module) else f"not installed (pip install {distribution})"


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    return {distribution: version(distribution) for distribution, module in PEERS.values() if importlib.util.find_spec(module)}


def _prepare(name: str, task: Ragged | Search, threads: int) -> Call:
    module = importlib.import_module(PEERS[name][1])
    x = task.tensors()
    if isinstance(task, Search):
        module.omp_set_num_threads(threads)
        if "threshold" in name:
            module.cvar.distance_compute_blas_threshold = 20
        index = module.IndexFlatIP(task.d)
        index.add(x["documents"].numpy())
        queries, k = x["queries"].numpy(), task.k
        return lambda: index.search(queries, k)[0]
    documents = [block.numpy() for block in x["tokens"].split_with_sizes(x["d_offsets"].diff().tolist())]
    q = x["q"].numpy()
    return lambda: module.maxsim_scores_variable(q, documents)


def _serve(pipe: Connection, name: str, task: Ragged | Search, threads: int) -> None:
    """The peer's process: its result first, then the seconds of one call for every True it receives."""
    os.environ.update(RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
    torch.set_num_threads(threads)
    try:
        call = _prepare(name, task, threads)
        pipe.send(np.asarray(call()))
    except BaseException as problem:  # noqa: BLE001 — a Rust panic is no Exception
        pipe.send(f"{type(problem).__name__}: {problem}")
        return
    while pipe.recv():
        pipe.send(seconds(call))


def seconds(call: Call) -> float:
    """Wall-clock time of a second call after a first: processors and threads that slept since the last contender are awake then."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Remote:
    """A peer in a process of its own; `problem` says why there are no times of it."""

    def __init__(self, name: str, task: Ragged | Search, threads: int) -> None:
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
