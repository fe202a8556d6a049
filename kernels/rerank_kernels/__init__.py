"""Operators of neural reranking: a definition in plain torch, Triton kernels and a fast CPU path behind one call."""

from __future__ import annotations

from rerank_kernels.ambient import exactly
from rerank_kernels.backend import BACKENDS, use_backend
from rerank_kernels.contrast_score import contrast_score
from rerank_kernels.packed_attention import packed_attention
from rerank_kernels.project_normalize import pool_normalize, project_normalize, project_quantize
from rerank_kernels.reference import MIN_TAU, zscore
from rerank_kernels.row_passes import add_norm_, bias_gelu_
from rerank_kernels.similarity_topk import similarity_topk
from rerank_kernels.subspace_attention import subspace_attention

__all__ = [
    "BACKENDS", "MIN_TAU", "add_norm_", "bias_gelu_", "contrast_score", "exactly", "packed_attention", "pool_normalize", "project_normalize", "project_quantize", "similarity_topk", "subspace_attention",
    "use_backend", "zscore",
]  # fmt: skip
