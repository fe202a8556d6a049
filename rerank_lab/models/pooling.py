"""One vector of the states of a text's tokens, as the Pooling module of sentence-transformers makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rerank_lab.errors import UserError

POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len")


def pooling_mode(config: Mapping[str, Any], name: str) -> str:
    """How a Pooling module pools, one of POOLINGS, by its config.json, which older releases wrote otherwise.

    Raises:
        UserError: it pools in several ways or in one that is not known; `name` is the model's, for the message.
    """
    if "pooling_mode" in config:
        modes = config["pooling_mode"] if isinstance(config["pooling_mode"], list) else [config["pooling_mode"]]
    else:
        switched = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [key.removeprefix("pooling_mode_").removesuffix("_token") for key in switched]
    modes = [str(mode).removesuffix("_tokens") for mode in modes] or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        raise UserError(f"model {name!r} pools by {', '.join(modes)}; known are {', '.join(POOLINGS)}, one at a time")
    return str(modes[0])


def pooled(pooling: str, h: Tensor, before: int) -> Tensor:
    """One vector (d) of a text's states h (L × d, L ≥ 1).

    Args:
        pooling: "max", "mean", "mean_sqrt_len" (the sum over √L) or "weightedmean" (a token weighs as much as its place, counted from 1).
        h: the states.
        before: tokens before the first of these, which move its place.
    """
    match pooling:
        case "max":
            return h.amax(0)
        case "mean_sqrt_len":
            return h.sum(0) / math.sqrt(len(h))
        case "weightedmean":
            weights = torch.arange(before + 1, before + 1 + len(h), dtype=h.dtype, device=h.device)
            return (h * weights[:, None]).sum(0) / weights.sum()
    return h.mean(0)
