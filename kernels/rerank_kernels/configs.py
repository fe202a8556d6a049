"""Launch configurations. Each operator has a table of them by architecture, dtype and width, made without timing; a file of tuned ones overrides it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .backend import interpreted, tl
from .names import DTYPES

# Read by kernels, so that they know what the interpreter cannot do.
INTERPRETED = tl.constexpr(interpreted())
NAMES = dict(zip((torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn), DTYPES))
# Triton's names of the element types behind the pointers of a signature.
POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv"}
WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows of documents or tokens, queries or columns, steps of d) and what Triton is told."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_d}/{self.num_warps}/{self.num_stages}"


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: what ahead-of-time compilation and tuning need.

    Attributes:
        op, direction, dtype, d: what it serves.
        config: its tiles.
        kernel: the Triton function.
        signature: type of every argument, "constexpr" for those in constants.
        constants: values of the constexpr arguments.
        shape: the named shape that bytes and flops are of.
        bytes, flops: read and written; multiplications and additions, matrix products only.
        largest_tile: values of block_m × block_n that a program may hold, for tune.
    """

    op: str
    direction: str
    dtype: str
    d: int
    config: Config
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    shape: str
    bytes: float
    flops: float
    largest_tile: float = math.inf

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return next(dtype for dtype, name in NAMES.items() if name == self.dtype)


def tuned_path() -> Path:
    """The file of tuned configurations: $RERANK_KERNELS_CONFIGS, or configs.json in the user's cache."""
    return Path(os.path.expanduser(os.environ.get("RERANK_KERNELS_CONFIGS", "")) or Path.home() / ".cache" / "rerank_kernels" / "configs.json")


@lru_cache(maxsize=1)
def tuned() -> dict[str, Config]:
    """What `python -m rerank_kernels.tune` wrote, by key; empty where there is no file.

    Raises:
        ValueError: a file that is not one of tune's, with its path.
    """
    path = tuned_path()
    if not path.exists():
        return {}
    try:
        found = {key: Config(**values) for key, values in json.loads(path.read_text())["configs"].items()}
        if not all(isinstance(number, int) and number > 0 for config in found.values() for number in asdict(config).values()):
            raise ValueError("a value is no positive integer")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of tuned configurations ({error}): delete it, or write it again with python -m rerank_kernels.tune") from None


def key(op: str, direction: str, arch: str, dtype: str, d: int) -> str:
    """The name of a tuned configuration in the file."""
    return f"{op}/{direction}/{arch}/{dtype}/{d}"


def architecture(device: torch.device) -> str:
    """The architecture whose configurations a device takes: its compute capability's generation; sm_90 for the interpreter."""
    if device.type != "cuda":
        return "sm_90"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major <= 8 else "sm_90" if major == 9 else "sm_100"


def has_fp8(device: torch.device) -> bool:
    """Whether Triton kernels take float8_e4m3fn there: compute capability 8.9 on, and the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
