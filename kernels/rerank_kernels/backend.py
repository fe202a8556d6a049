"""Which implementation answers a call: the reference, the fast CPU path or the Triton kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .ambient import exactly
from .names import BACKENDS


class _Absent:
    """Stands for Triton where it is not installed (it has wheels for Linux alone). Kernels can be defined then, not launched."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, first: Any = None) -> Any:
        return first


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()

__all__ = ["BACKENDS", "HAS_TRITON", "chosen", "interpreted", "on_device", "operator", "resolve", "tl", "triton", "use_backend"]
HAS_TRITON = not isinstance(triton, _Absent)
_chosen: ContextVar[str] = ContextVar("rerank_kernels_backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, every operator runs on this backend.

    Args:
        name: "auto" (CUDA tensors: triton where it is installed, CPU tensors: cpu, others: reference), "reference", "cpu" or "triton".

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which works on CPU tensors; decided when triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve(tensor: Tensor) -> str:
    """The backend for a call whose tensors are on this one's device.

    Raises:
        ValueError: the chosen backend cannot run there.
    """
    name, device = _chosen.get(), tensor.device.type
    if name == "auto":
        return {"cuda": "triton" if HAS_TRITON else "reference", "cpu": "cpu"}.get(device, "reference")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if name == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu' runs on CPU tensors, not on {device}")
    if name == "triton" and device != "cuda" and not interpreted():
        raise ValueError(f"backend 'triton' runs on CUDA tensors, not on {device} (TRITON_INTERPRET=1 runs it in Triton's interpreter, slowly)")
    return name


def chosen() -> str:
    """The backend that `use_backend` has set here, for work that goes on in another thread."""
    return _chosen.get()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it, the current GPU, on which Triton launches, is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def operator(name: str, differentiable: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as torch's operator rerank_kernels::name for all devices, and returns that operator.

    torch.library.custom_op does the same with a wrapper that costs a cold call a tenth of a millisecond.

    Args:
        name: without the namespace.
        differentiable: whether the caller registers a gradient; without one, a backward through the operator is an error.
    """

    def register(function: Callable[..., Any]) -> Any:
        full = f"rerank_kernels::{name}"
        torch.library.define(full, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(full, "default", exactly(tensors=False)(function))
        if not differentiable:

            def refuse(ctx: Any, *grads: Any) -> None:
                raise RuntimeError(f"{full} has no gradient: detach its arguments")

            torch.library.register_autograd(full, refuse)
        return getattr(torch.ops.rerank_kernels, name).default

    return register
