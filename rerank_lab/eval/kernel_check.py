"""The kernel check: do the kernels rank as their definition does? It ranks by the operators on documents in each dtype, and by plain torch in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import project_quantize, similarity_topk, subspace_attention, use_backend
from rerank_lab.eval.records import KernelRecords, Record
from rerank_lab.methods import Pool
from rerank_lab.models.base import EncodedQuery, Vectors
from rerank_lab.reranker import Ranking, Reranker

CHECKED_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class CastPool(Pool):
    """A pool whose operators read the documents' vectors in another dtype."""

    def __init__(self, *args: Any, dtype: torch.dtype, **options: Any):
        super().__init__(*args, **options)
        self.dtype = dtype

    def similarity(self, query: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        rows, scales = cast(documents, self.dtype)
        if scales is not None and self.metric == "dot":  # quantising normalises each row
            scales = scales * documents.float().norm(dim=1)
        return similarity_topk(query, rows, len(self), metric=self.metric, scales=scales)

    def attend(self, query: Vectors, documents: Vectors, pairs: Tensor, tau: float) -> Tensor:
        rows, scales = cast(documents.tokens, self.dtype)
        own = query.tokens.float() if scales is not None else query.tokens.to(self.dtype)
        return subspace_attention(own, query.offsets, rows, documents.offsets, pairs, tau, scales=scales)


def cast(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Casts rows (n × d) to a dtype. Returns them and, for a quantised dtype, the scale of each row (n, fp32), otherwise None."""
    return (rows.to(dtype), None) if dtype.is_floating_point and dtype.itemsize > 1 else project_quantize(rows.float(), None, dtype)


class CastReranker:
    """A reranker whose operators read the documents' vectors in another dtype.

    Args:
        reranker: gives the method and the models, without a cross-encoder.
        dtype: of the documents' vectors.
        reads: query → its vectors. It is filled here and shared between dtypes.
        backend: runs the operators; None: the one that is chosen already.
    """

    def __init__(self, reranker: Reranker, dtype: torch.dtype, reads: dict[str, EncodedQuery], backend: str | None = None):
        self.reranker, self.dtype, self.reads, self.backend = reranker, dtype, reads, backend

    def score(self, query: str, texts: Sequence[str], *, first_stage: Sequence[float] | None = None) -> Ranking:
        """As Reranker.score."""
        encoder, detail = self.reranker.encoder, self.reranker.detail
        assert encoder is not None
        with use_backend(self.backend) if self.backend else nullcontext(), torch.inference_mode():
            pool = self.reranker.pool(partial(CastPool, dtype=self.dtype), query, texts)
            if query in self.reads:
                pool.keep_query(encoder, self.reads[query], detail)
            else:  # always by one backend, so that the vectors do not depend on which dtype comes first
                with use_backend("reference"):
                    self.reads[query] = pool.encoded_query(encoder, detail)
            ranking = self.reranker.finish(pool, first_stage)
        self.reranker.engine.trim()
        return ranking

    def __reduce__(self) -> tuple[type[CastReranker], tuple[Any, ...]]:
        return CastReranker, (self.reranker, self.dtype, {}, self.backend)


def check(label: str, reranker: Reranker, dtypes: Sequence[str], records: Callable[[str, CastReranker], list[Record]]) -> KernelRecords:
    """Ranks every query by the definition in fp32, and by the chosen kernels in each dtype.

    Args:
        label, reranker: the row.
        dtypes: names from CHECKED_DTYPES.
        records: label and ranker → one record for each query.
    """
    reads: dict[str, EncodedQuery] = {}
    title = f"{label} by kernels, "
    definition = records(f"{title}definition", CastReranker(reranker, torch.float32, reads, "reference"))
    return KernelRecords(definition, {name: records(title + name, CastReranker(reranker, CHECKED_DTYPES[name], reads)) for name in dtypes})


def supported_dtypes(device: torch.device) -> list[str]:
    """Names of the dtypes that the chosen kernels read on this device."""
    return [name for name, dtype in CHECKED_DTYPES.items() if _runs(dtype, device)]


def _runs(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        rows, scales = cast(torch.eye(2, 16, dtype=torch.float32, device=device), dtype)
        similarity_topk(torch.eye(1, 16, dtype=torch.float32, device=device), rows, 1, scales=scales)
        return True
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError):  # rerank_kernels, Python and torch raise these for a dtype that a device lacks
        return False
