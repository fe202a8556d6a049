"""Keeps what a process has set for its own ends away from results.

torch has settings that change the arithmetic of code that does not name them: autocast, fp32 products in fewer bits
(set_float32_matmul_precision, allow_tf32, fp32_precision), subnormal numbers flushed to 0, the default device, inference
mode. The default dtype is left as it is: it belongs to the whole process, so every tensor made here names its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch

Function = TypeVar("Function", bound=Callable[..., Any])
DEVICES = ("cpu", "cuda", "mps")  # that have an autocast of their own
PRODUCTS: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
NUMPY: Any = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}  # as numpy starts
TINY = 2.0**-1074  # the smallest subnormal number; twice that is 0 in a thread that flushes them
_here = threading.local()


class _Products:
    """Makes fp32 products exact while a thread needs that. The setting is the process's: the first to enter sets it, the last to leave restores it.

    Meanwhile other threads' products are exact too, and slower if they were not before. No dtype changes.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, dict[Any, str]()

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            for matmul in PRODUCTS:
                if (held := matmul.fp32_precision) not in ("none", "ieee"):
                    self.before[matmul], matmul.fp32_precision = held, "ieee"

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            while self.before and not self.inside:
                matmul, held = self.before.popitem()
                matmul.fp32_precision = "none"  # then torch.backends.fp32_precision decides, as it may have before
                if matmul.fp32_precision != held:
                    matmul.fp32_precision = held


_products = _Products()


class exact:
    """Within it, this thread computes what the code says: no autocast, exact fp32 products, subnormal numbers kept, no errors raised by numpy.

    Args:
        tensors: also, new tensors are on the CPU where their maker, another library say, names no device, and can be used outside of
            inference mode.
    """

    def __init__(self, tensors: bool = True):
        self.level, self.before, self.stack = 1 + tensors, 0, ExitStack()

    def __enter__(self) -> None:
        self.before = getattr(_here, "level", 0)
        if self.before >= self.level:
            return
        enter = self.stack.enter_context
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                enter(torch.autocast(device, enabled=False))
        if TINY * 2 == 0:
            torch.set_flush_denormal(False)  # of this thread
            self.stack.callback(torch.set_flush_denormal, True)
        if np.geterr() != NUMPY:
            enter(np.errstate(**NUMPY))
        if self.level > 1:
            if torch.get_default_device().type != "cpu":
                enter(torch.device("cpu"))
            if torch.is_inference_mode_enabled():
                enter(torch.inference_mode(False))
                enter(torch.no_grad())
        _products.enter()
        _here.level = self.level

    def __exit__(self, *error: object) -> None:
        if self.before < self.level:
            _here.level = self.before
            _products.leave()
            self.stack.close()


def exactly(tensors: bool) -> Callable[[Function], Function]:
    """A decorator whose function runs within `exact`; `tensors` as there."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with exact(tensors):
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate
