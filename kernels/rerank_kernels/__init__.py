"""Operators of neural reranking: similarity with top-k, subspace attention, score fusion.

Needs torch alone and knows nothing of rerank_lab. Every operator is imported from here, never from the module
that defines it, so that a faster implementation can take a name over without any caller changing.
"""

from rerank_kernels.reference import MIN_TAU, contrast_score, pool_normalize, project_normalize, similarity_topk, subspace_attention, zscore

__all__ = ["MIN_TAU", "contrast_score", "pool_normalize", "project_normalize", "similarity_topk", "subspace_attention", "zscore"]
