"""What a transformer does with whole rows between two matrix products, in one pass over memory and in place.

bias_gelu_: x ← gelu(x + bias). add_norm_: x ← layer_norm(x + bias + residual) · weight + shift. Both are CPU operators, like
packed_attention: on a GPU torch's own kernels, or a compiler's, do this.
"""

from __future__ import annotations

from torch import Tensor

from . import backend, checks, cpu, reference


def bias_gelu_(x: Tensor, bias: Tensor) -> Tensor:
    """x becomes gelu(x + bias), with the exact erf (within 1.5e-7 on the CPU).

    Args:
        x: N × d, any float type, without gradient; changed.
        bias: d, of x's type and device.

    Raises:
        ValueError: arguments that do not fit.
    """
    checks.matrix("x", x)
    _vectors(x, bias=bias)
    if backend.resolve(x) == "cpu" and cpu.native_rows(x, bias):
        return x
    return x.copy_(reference.bias_gelu(x, bias))


def add_norm_(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x becomes the layer norm of x + bias + residual.

    Args:
        x: N × d, any float type, without gradient; changed.
        bias: d; None: 0.
        residual: N × d.
        weight, shift: d, of the norm.
        eps: what is added to the variance.

    Raises:
        ValueError: arguments that do not fit.
    """
    checks.matrix("x", x)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual must be {x.dtype} of shape {tuple(x.shape)}, not {residual.dtype} of shape {tuple(residual.shape)}")
    _vectors(x, weight=weight, shift=shift, bias=bias)
    checks.same_device(x=x, residual=residual)
    if backend.resolve(x) == "cpu" and cpu.native_rows(x, bias, residual, (weight, shift, eps)):
        return x
    return x.copy_(reference.add_norm(x, bias, residual, weight, shift, eps))


def _vectors(x: Tensor, **named: Tensor | None) -> None:
    for name, vector in named.items():
        if vector is not None and (vector.shape != x.shape[1:] or vector.dtype != x.dtype):
            raise ValueError(f"{name} must be {x.dtype} of length {x.shape[1]}, not {vector.dtype} of shape {tuple(vector.shape)}")
    checks.same_device(x=x, **named)
