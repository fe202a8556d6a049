"""What `bench` times of similarity_topk: a search for the best of 100,000 documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bench_tasks import Call, Task
from .samples import seeded, unit


def tasks(quick: bool, cuda: bool) -> Iterator[Search]:
    """In the order of the report, the same on a GPU; `quick`: small ones."""
    yield from (Search(queries, 2000 if quick else 100_000) for queries in (1, 64))


@dataclass(frozen=True)
class Search(Task):
    """Queries against documents, unit vectors of width d, the k best by dot product."""

    queries: int
    documents: int = 100_000
    d: int = 384
    k: int = 100

    ours = ("similarity_topk", "similarity_topk, cosine")
    peers = ("faiss IndexFlatIP", "faiss, BLAS threshold 20")
    matrix = "documents"
    tolerance = 2e-5  # of dot products

    @property
    def products(self) -> int:
        return self.queries

    def tensors(self) -> dict[str, Tensor]:
        """queries and documents as similarity_topk takes them."""
        g = seeded(self.queries)
        sizes = {"queries": self.queries, "documents": self.documents}
        return {name: unit(count, self.d, g) for name, count in sizes.items()}

    def title(self, x: dict[str, Tensor]) -> str:
        if x["documents"].is_cuda:
            return f"top {self.k} of {self.documents:,}, {self.queries} queries, d = {self.d}, fp16"
        return f"top {self.k} of {self.documents:,} documents, {self.queries} {'query' if self.queries == 1 else 'queries'}, d = {self.d}, fp32"

    def on_cpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        from . import similarity_topk

        queries, documents, k = x["queries"], x["documents"], self.k
        return {
            "similarity_topk": lambda: similarity_topk(queries, documents, k, metric="dot")[0],
            "similarity_topk, cosine": lambda: similarity_topk(queries, documents, k)[0],
            "torch matmul, topk": lambda: (documents @ queries.T).T.contiguous().topk(k).values,
            "numpy matmul, argpartition": lambda: numpy_topk(queries.numpy(), documents.numpy(), k),
        }

    def on_gpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        from . import similarity_topk

        queries, documents, k = x["queries"], x["documents"], self.k
        compiled = torch.compile(lambda: (queries @ documents.T).topk(k).values)
        return {
            "similarity_topk": lambda: similarity_topk(queries, documents, k, metric="dot")[0],
            "torch matmul, topk": lambda: (queries @ documents.T).topk(k).values,
            "torch.compile of it": compiled,
        }

    def peer(self, name: str, module: Any, threads: int) -> Call:
        x = self.tensors()
        module.omp_set_num_threads(threads)
        if "threshold" in name:
            module.cvar.distance_compute_blas_threshold = 20
        index = module.IndexFlatIP(self.d)
        index.add(x["documents"].numpy())
        queries, k = x["queries"].numpy(), self.k
        return lambda: index.search(queries, k)[0]


def numpy_topk(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """Values of the k best: product, argpartition, sort."""
    s = queries @ documents.T
    some = np.take_along_axis(s, np.argpartition(s, s.shape[1] - k, 1)[:, -k:], 1)
    return -np.sort(-some, 1)
