"""Operators of neural reranking: a definition in plain torch, Triton kernels and a fast CPU path behind one call.

They are loaded on first use: torch takes seconds to import, and a command's --help does without.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rerank_kernels.names import BACKENDS

if TYPE_CHECKING:
    from rerank_kernels.ambient import exactly
    from rerank_kernels.backend import use_backend
    from rerank_kernels.contrast_score import contrast_score
    from rerank_kernels.packed_attention import packed_attention
    from rerank_kernels.project_normalize import pool_normalize, project_normalize, project_quantize
    from rerank_kernels.reference import MIN_TAU, zscore
    from rerank_kernels.row_passes import add_norm_, bias_gelu_
    from rerank_kernels.similarity_topk import similarity_topk
    from rerank_kernels.subspace_attention import subspace_attention
else:
    LOADED = {
        "exactly": "ambient", "use_backend": "backend", "contrast_score": "contrast_score", "packed_attention": "packed_attention", "pool_normalize": "project_normalize",
        "project_normalize": "project_normalize", "project_quantize": "project_normalize", "MIN_TAU": "reference", "zscore": "reference", "add_norm_": "row_passes",
        "bias_gelu_": "row_passes", "similarity_topk": "similarity_topk", "subspace_attention": "subspace_attention",
    }  # fmt: skip

    def __getattr__(name: str) -> Any:
        if name not in LOADED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # All of them at once, so that torch knows every operator as soon as one is used.
        globals().update({own: getattr(import_module(f"{__name__}.{module}"), own) for own, module in LOADED.items()})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *LOADED})

    class _Package(ModuleType):
        """An operator and its file share a name, and here the name means the operator, whichever of the two is imported first."""

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in LOADED and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package

__all__ = [
    "BACKENDS", "MIN_TAU", "add_norm_", "bias_gelu_", "contrast_score", "exactly", "packed_attention", "pool_normalize", "project_normalize", "project_quantize", "similarity_topk", "subspace_attention",
    "use_backend", "zscore",
]  # fmt: skip
