"""Scores and operators under what a process may have set, for test_ambient.py: what differs from a process that has set nothing, as JSON on stdout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor

import rerank_kernels as k
from rerank_kernels.ambient import TINY
from rerank_lab import Reranker

TEXTS = ["Merge two tables on a key.", "", "Sort by the values along either axis. " * 3, "The roots of a polynomial.", "Merge two tables on a key."]
METHODS = ("fast", "best", "best:gamma=0.5:lexical=0.3", "standard")
INTERPRETED = ("bfloat16", "meta", "autocast", "numpy")
MAKING = ("bfloat16", "meta", "inference")  # those under which models are loaded too


@contextmanager
def ambient(name: str) -> Iterator[None]:
    """A setting, and what was before."""
    match name:
        case "bfloat16" | "float16" | "float64":
            torch.set_default_dtype(getattr(torch, name))
            yield
            torch.set_default_dtype(torch.float32)
        case "meta":
            torch.set_default_device("meta")
            yield
            torch.set_default_device(None)
        case "no_grad":
            torch.set_grad_enabled(False)
            yield
            torch.set_grad_enabled(True)
        case "inference":
            with torch.inference_mode():
                yield
        case "deterministic":
            torch.use_deterministic_algorithms(True)
            yield
            torch.use_deterministic_algorithms(False)
        case "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                yield
        case "medium":
            torch.set_float32_matmul_precision("medium")
            yield
            assert torch.get_float32_matmul_precision() == "medium"
            torch.set_float32_matmul_precision("highest")
        case "fp32_precision":
            backends: Any = torch.backends
            backends.fp32_precision = "bf16"
            yield
            assert backends.mkldnn.matmul.fp32_precision == "bf16"
            backends.fp32_precision = "none"
            assert backends.mkldnn.matmul.fp32_precision == "none"
        case "numpy":
            with np.errstate(all="raise"):
                yield
        case "denormal":
            torch.set_flush_denormal(True)
            yield
            assert TINY * 2 == 0
            torch.set_flush_denormal(False)
        case _:
            torch.manual_seed(9)
            np.random.seed(3)
            yield


SETTINGS = (
    "fp32_precision", "bfloat16", "float16", "float64", "meta", "no_grad", "inference", "deterministic", "autocast", "medium", "numpy", "denormal", "seed",
)  # fmt: skip


def loaded() -> dict[str, Reranker]:
    """A reranker a method; those of one kind share their models."""
    first = Reranker(method="standard", device="cpu")
    return {method: first.using(method, cross=method == "standard") for method in METHODS}


def scores(rerankers: dict[str, Reranker], old: dict[str, Reranker]) -> Iterator[tuple[str, Any]]:
    """What rankings say, with vectors made now and with those that were made before."""
    for name, reranker in rerankers.items():
        yield name, reranker.without_cache().score("zeros of a polynomial", TEXTS).scores
        yield f"{name}, cached", old[name].score("zeros of a polynomial", TEXTS).scores
        results = old[name].rank("zeros of a polynomial", TEXTS, first_stage=[0.1, 0.2, 0.3, 0.4, 1e-30])
        yield f"{name}, ranked", torch.tensor([r.relevance_score for r in results], dtype=torch.float64, device="cpu")


def tensors() -> dict[str, Any]:
    """Arguments of the operators, made where nothing is set."""
    g = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(40, 48, generator=g), dim=-1)
    small = torch.where(torch.rand(30, 48, generator=g) < 0.5, unit[:30], unit[:30] * 1e-6).half()  # with fp16's subnormal numbers
    return {
        "q": unit[30:37], "q_offsets": torch.tensor([0, 4, 7]), "d": small, "d_offsets": torch.tensor([0, 9, 9, 30]), "V": torch.linalg.qr(unit.T)[0][:, :16],
        "pairs": torch.tensor([[0, 0], [0, 1], [0, 2], [1, 2]]), "h": unit, "offsets": torch.tensor([0, 11, 11, 40]), "segments": torch.tensor([0, 10, 13]),
        "cosine": torch.linspace(0, 1, 3), "a_offsets": torch.tensor([0, 4, 8, 12]), "pools": torch.tensor([0, 3]),
    }  # fmt: skip


def operators(x: dict[str, Any], interpreted: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every operator on every backend that runs on the CPU, the C library at each of its levels; `interpreted`: Triton's too, which takes long."""
    for backend, level in [
        ("reference", ""),
        *([("triton", "")] if interpreted else []),
        *(("cpu", level) for level in ("avx512", "avx2", "baseline", "torch")),
    ]:
        os.environ["RERANK_KERNELS_SIMD"] = level
        with k.use_backend(backend):
            name = f"{backend} {level}".strip()
            for tau in (0.1, 0.0):
                yield f"subspace_attention {tau} {name}", k.subspace_attention(x["q"], x["q_offsets"], x["d"], x["d_offsets"], x["pairs"], tau)
            A = k.subspace_attention(x["q"], x["q_offsets"], x["d"], x["d_offsets"], x["pairs"][:3])
            rest: dict[str, Any] = {"alpha": 2.0, "terms": [(x["cosine"].flip(0), 0.5)], "gamma": 0.5, "embeddings": x["h"][:3]}
            yield f"contrast_score {name}", k.contrast_score(A, x["a_offsets"], x["pools"], x["cosine"], **rest)
            for segments in (None, x["segments"]):
                values, indices = k.similarity_topk(x["h"][:2], x["h"][:13], 5, segments)
                yield f"similarity_topk {segments is None} {name}", values
                yield f"similarity_topk's indices {segments is None} {name}", indices
            rows, scales = k.project_quantize(x["h"], x["V"])
            yield f"project_quantize {name}", rows
            yield f"its scales {name}", scales
            yield f"on int8 {name}", k.similarity_topk(x["h"][:2, :16], rows, 3, None, "dot", scales)[0]
            yield f"project_normalize {name}", k.project_normalize(x["h"], x["V"])
            yield f"pool_normalize {name}", k.pool_normalize(x["h"], x["offsets"])
            if backend != "triton":
                yield f"packed_attention {name}", k.packed_attention(x["h"], x["h"], x["h"], x["offsets"], x["offsets"], 4, x["h"][0])
                yield f"bias_gelu_ {name}", k.bias_gelu_(x["h"].clone(), x["h"][0])
                yield f"add_norm_ {name}", k.add_norm_(x["h"].clone(), x["h"][0], x["h"], x["h"][1], x["h"][2], 1e-12)
            yield f"zscore {name}", k.zscore(x["h"])


def differing(run: Callable[[], Iterator[tuple[str, Tensor]]], plain: dict[str, Tensor]) -> list[str]:
    """What is not the same to the bit, or of another type."""
    try:
        return [name for name, found in run() if found.dtype != plain[name].dtype or found.numpy().tobytes() != plain[name].numpy().tobytes()]
    except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError) as error:
        return [f"{type(error).__name__}: {error}"]


def main() -> None:
    x, rerankers = tensors(), loaded()
    plain = dict(operators(x))
    for _ in range(2):  # the second time all is cached
        plain |= scores(rerankers, rerankers)
    found = {}
    for name in SETTINGS:
        with ambient(name):
            made = loaded() if name in MAKING else rerankers
            found[name] = differing(partial(operators, x, name in INTERPRETED), plain) + differing(partial(scores, made, rerankers), plain)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
