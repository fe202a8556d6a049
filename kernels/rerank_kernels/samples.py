"""Random tensors from a seed, which `tune` and `bench` hand to the operators that they time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .reference import LARGEST, quantize


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator("cpu").manual_seed(seed)


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Normally distributed numbers, rows × columns, fp32, on the CPU."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


def unit(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Rows of unit length, rows × columns, fp32, on the CPU."""
    return normalize(normal(rows, columns, generator), dim=-1)


def documents(rows: int, columns: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Rows of unit length in a dtype, on a device, and the scales of quantised ones."""
    x = unit(rows, columns, generator).to(device)
    return quantize(x, dtype) if dtype in LARGEST else (x.to(dtype), None)
