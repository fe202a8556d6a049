"""Operators of neural reranking: a definition in plain torch, Triton kernels and a fast CPU path behind one call.

This file is the table of operators. A new one is a file of its own, which begins with its formula; its definition in
reference.py; its line in the table, with its import for type checkers; and its test. Operators are loaded on first use:
torch takes seconds to import, and a command's --help does without it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from .names import BACKENDS as BACKENDS

if TYPE_CHECKING:
    from .ambient import exactly as exactly
    from .backend import use_backend as use_backend
    from .contrast_score import contrast_score as contrast_score
    from .packed_attention import packed_attention as packed_attention
    from .project_normalize import pool_normalize as pool_normalize
    from .project_normalize import project_normalize as project_normalize
    from .project_normalize import project_quantize as project_quantize
    from .reference import MIN_TAU as MIN_TAU
    from .reference import zscore as zscore
    from .row_passes import add_norm_ as add_norm_
    from .row_passes import bias_gelu_ as bias_gelu_
    from .similarity_topk import similarity_topk as similarity_topk
    from .subspace_attention import subspace_attention as subspace_attention


class Operator(NamedTuple):
    """A line of the table: where an operator is, and what its file declares for the commands.

    Attributes:
        module: the file that holds it.
        compiled: the file has `variants(arch)`, every compilation of the operator's Triton kernels, which `inspect` compiles.
        tuned: the file has `workload(variant, device, rows)`, a call of the operator, which `tune` times.
        bench: the file whose `tasks(quick, cuda)` are what `bench` times of it; "" for none.
    """

    module: str
    compiled: bool = False
    tuned: bool = False
    bench: str = ""


OPERATORS = {
    "similarity_topk": Operator("similarity_topk", compiled=True, tuned=True, bench="bench_search"),
    "subspace_attention": Operator("subspace_attention", compiled=True, tuned=True, bench="bench_maxsim"),
    "contrast_score": Operator("contrast_score", compiled=True),
    "project_normalize": Operator("project_normalize", compiled=True, tuned=True),
    "project_quantize": Operator("project_normalize"),
    "pool_normalize": Operator("project_normalize", compiled=True),
    "packed_attention": Operator("packed_attention"),
    "bias_gelu_": Operator("row_passes"),
    "add_norm_": Operator("row_passes"),
}
# The other names of the package, and their files.
OTHERS = {"exactly": "ambient", "use_backend": "backend", "MIN_TAU": "reference", "zscore": "reference"}

if not TYPE_CHECKING:
    LOADED = {name: operator.module for name, operator in OPERATORS.items()} | OTHERS
    __all__ = ["BACKENDS", *LOADED]  # noqa: PLE0604 — the table's names are strings

    def __getattr__(name: str) -> Any:
        if name not in LOADED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # All are loaded at once, so that torch knows every operator as soon as one is used.
        globals().update({own: getattr(import_module(f".{module}", __name__), own) for own, module in LOADED.items()})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *LOADED})

    class _Package(ModuleType):
        """An operator and its file share a name. Here the name means the operator, whichever of the two is imported first."""

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in LOADED and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package
