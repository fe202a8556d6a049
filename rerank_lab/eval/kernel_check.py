"""Does the kernel rank as its definition does: the operators on documents in each type of number, beside plain torch in fp32 on the same vectors."""

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

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class CastPool(Pool):
    """A pool whose operators read the documents' vectors in another type."""

    def __init__(self, *args: Any, dtype: torch.dtype, **options: Any):
        super().__init__(*args, **options)
        self.dtype = dtype

    def similarity(self, query: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        rows, scales = cast(documents, self.dtype)
        if scales is not None and self.metric == "dot":  # quantised rows are of unit vectors
            scales = scales * documents.float().norm(dim=1)
        return similarity_topk(query, rows, len(self), metric=self.metric, scales=scales)

    def attend(self, query: Vectors, documents: Vectors, pairs: Tensor, tau: float) -> Tensor:
        rows, scales = cast(documents.tokens, self.dtype)
        own = query.tokens.float() if scales is not None else query.tokens.to(self.dtype)
        return subspace_attention(own, query.offsets, rows, documents.offsets, pairs, tau, scales=scales)


def cast(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows (n × d) in another type, and the scale of each (n, fp32) where it is a quantised one."""
    return (rows.to(dtype), None) if dtype.is_floating_point and dtype.itemsize > 1 else project_quantize(rows.float(), None, dtype)


class Cast:
    """A reranker whose operators read the documents in another type.

    Args:
        reranker: whose method and models; none of them a cross-encoder.
        dtype: of the documents' vectors.
        reads: query → what the bi-encoder made of it, filled here and shared with other types.
        backend: what answers the operators; None: what is chosen already.
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
            else:  # in the one way, whichever type of number comes first
                with use_backend("reference"):
                    self.reads[query] = pool.encoded_query(encoder, detail)
            ranking = self.reranker.finish(pool, first_stage)
        self.reranker.engine.trim()
        return ranking

    def __reduce__(self) -> tuple[type[Cast], tuple[Any, ...]]:
        return Cast, (self.reranker, self.dtype, {}, self.backend)


def check(label: str, reranker: Reranker, types: Sequence[str], records: Callable[[str, Cast], list[Record]]) -> KernelRecords:
    """Every query's record by the definition in fp32 and by the chosen kernels in each of these types.

    Args:
        label, reranker: the row.
        types: names from DTYPES.
        records: a label and what ranks → a record a query.
    """
    reads: dict[str, EncodedQuery] = {}
    title = f"{label} by kernels, "
    definition = records(f"{title}definition", Cast(reranker, torch.float32, reads, "reference"))
    return KernelRecords(definition, {name: records(title + name, Cast(reranker, DTYPES[name], reads)) for name in types})


def types(device: torch.device) -> list[str]:
    """The types that the chosen kernels read on this device."""
    return [name for name, dtype in DTYPES.items() if _runs(dtype, device)]


def _runs(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        rows, scales = cast(torch.eye(2, 16, dtype=torch.float32, device=device), dtype)
        similarity_topk(torch.eye(1, 16, dtype=torch.float32, device=device), rows, 1, scales=scales)
        return True
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError):  # what rerank_kernels, Python and torch say of a type that a device does not have
        return False
