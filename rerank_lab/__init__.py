"""rerank_lab: which reranking method is best on your data, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rerank_lab.reranker import Ranking, Reranker, Result, rerank

__all__ = ["Ranking", "Reranker", "Result", "rerank"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: --help and the loaders do without it.
    if name in __all__:
        from rerank_lab import reranker

        return getattr(reranker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
