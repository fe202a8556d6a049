"""What a process may have set for its own ends, and what none of it may do to a result.

torch has settings that change the arithmetic of code that does not name them: autocast, fp32 products in fewer bits
(set_float32_matmul_precision, allow_tf32, fp32_precision), numbers below the normal ones taken for 0, the default device,
inference mode. The default dtype is no part of
this: it belongs to the whole process, so every tensor made here names its own.
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
TINY = 2.0**-1074  # 0 in arithmetic where a thread takes numbers below the normal ones for 0
_here = threading.local()


class _Products:
    """fp32 products in fp32. The setting is the process's: the first that needs it sets it, the last one puts back what stood there.

    Other threads' products are as exact meanwhile, and slower where they were not; nobody's types change.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, dict[Any, str]()

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            for backend in PRODUCTS:
                if (held := backend.fp32_precision) not in ("none", "ieee"):
                    self.before[backend], backend.fp32_precision = held, "ieee"

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            while self.before and not self.inside:
                backend, held = self.before.popitem()
                backend.fp32_precision = "none"  # then torch.backends.fp32_precision decides, as it may have before
                if backend.fp32_precision != held:
                    backend.fp32_precision = held


_products = _Products()


class exact:
    """Within it, this thread computes what the code says: no autocast, fp32 products in fp32, small numbers kept, no raising numpy.

    Args:
        tensors: also that new tensors are on the CPU where nothing names a device, as other libraries may not, and fit for use outside
            of inference mode.
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
    """Makes functions run within `exact`; `tensors` as there."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with exact(tensors):
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate
