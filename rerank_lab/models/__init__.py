"""Models: bi-encoders and cross-encoders, their checkpoints, and how they are run.

`load_bi_encoder` and `load_cross_encoder` are here for those who use the library, loaded on first use: they bring torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder

__all__ = ["load_bi_encoder", "load_cross_encoder"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rerank_lab.models import kinds

        return getattr(kinds, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
