"""Argument checks that all operators share: each names the argument and what it held, before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from .configs import has_fp8

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def check(condition: bool, name: str, wanted: str, held: object) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {wanted}, not {held}")


def matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS, columns: int | None = None) -> None:
    """Refuses what is no matrix of one of these dtypes and so many columns (None: any number but 0)."""
    if x.ndim == 2 and x.dtype in dtypes and x.shape[1] > 0 and columns in (None, x.shape[1]):
        return
    check(x.ndim == 2, name, "a matrix", f"of shape {tuple(x.shape)}")
    check(x.dtype in dtypes, name, " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes), x.dtype)
    check(x.shape[1] == columns if columns is not None else x.shape[1] > 0, name, f"of {columns or 'at least 1'} columns", f"of shape {tuple(x.shape)}")


def offsets(name: str, x: Tensor, count: int | None = None) -> None:
    """Refuses offsets of a wrong shape or dtype, or not count + 1 of them. `rising` checks what they hold."""
    if x.ndim == 1 and x.dtype == torch.int64 and (x.shape[0] > 0 if count is None else x.shape[0] == count + 1 > 0):
        return
    check(x.ndim == 1 and len(x) > 0 and x.dtype == torch.int64, name, "int64 offsets of at least one element", f"{x.dtype} of shape {tuple(x.shape)}")
    check(count is None or len(x) == count + 1, name, f"of length {(count or 0) + 1}", f"of length {len(x)}")


def same_device(**tensors: Tensor | None) -> None:
    """Refuses tensors that are on another device than the first; None is left out."""
    first = device = None
    for name, x in tensors.items():
        if x is None:
            continue
        if first is None:
            first, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{name} must be on {device} as {first} is, not on {x.device}")


def row_scales(name: str, documents: Tensor, scales: Tensor | None) -> None:
    """Refuses quantised documents without one fp32 scale for each row, and others with scales."""
    if documents.dtype in QUANTIZED:
        check(scales is not None, "scales", f"given with {documents.dtype} {name}", "None")
    if scales is not None:
        check(documents.dtype in QUANTIZED, "scales", f"None with {documents.dtype} {name}", f"of shape {tuple(scales.shape)}")
        good = scales.dtype == torch.float32 and scales.shape == documents.shape[:1]
        check(good, "scales", f"float32 of length {len(documents)}", f"{scales.dtype} of shape {tuple(scales.shape)}")


def rising(*named: tuple[str, Tensor, int]) -> None:
    """Refuses offsets that do not rise from 0 to a number of rows. All are read in one transfer from their device.

    Args:
        named: (name, offsets, rows).
    """
    facts = torch.stack([torch.stack([x[0], x[-1], x.diff().amin() if len(x) > 1 else x.new_zeros(())]) for _, x, _ in named])
    for (name, x, rows), (first, last, step) in zip(named, facts.tolist()):
        if first != 0 or last != rows or step < 0:
            at = "" if step >= 0 else f" and fall after element {int((x.diff() < 0).nonzero()[0])}"
            raise ValueError(f"{name} must rise from 0 to {rows}, the number of rows, but go from {first} to {last}{at}")


def fp8_runs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses float8_e4m3fn on a GPU for which Triton has no fp8."""
    check(dtype != torch.float8_e4m3fn or has_fp8(device), name, "int8 on this GPU, which has no fp8 (compute capability below 8.9)", dtype)
