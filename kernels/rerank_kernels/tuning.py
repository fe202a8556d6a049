"""What `tune` does: times every configuration of every variant of an operator, and writes the fastest."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import torch

from rerank_kernels import project_normalize, reference, similarity_topk, subspace_attention, use_backend
from rerank_kernels.configs import NAMES, Config, Variant, architecture, key, tuned

Call = Callable[[], object]


def run(ops: Sequence[str], device: torch.device, timer: Callable[[Call], float], rows: int = 1000) -> dict[str, Config]:
    """The fastest configuration of every variant of these operators, by key.

    Args:
        ops: names of operators.
        device: where to launch.
        timer: a call → its time, in any unit.
        rows: documents of 160 tokens (a hundred times as many to search, a hundred and sixty tokens for each to project).
    """
    arch, found = architecture(device), dict[str, Config]()
    for op in ops:
        for variant in import_module(f"rerank_kernels.{op}").variants(arch):
            name = key(op, variant.direction, arch, variant.dtype, variant.d)
            if variant.op != op or variant.dtype not in NAMES.values() or name in found:
                continue
            times: dict[Config, float] = {}
            before = tuned().get(name)
            for config in candidates(variant):
                tuned()[name] = config
                try:
                    with use_backend("triton"):
                        times[config] = timer(workload(variant, device, rows))
                except Exception as problem:  # noqa: BLE001 — what does not fit the GPU is no candidate
                    print(f"  {name} {config}: {type(problem).__name__}", file=sys.stderr)
            if before is None:
                del tuned()[name]
            else:
                tuned()[name] = before
            if times:
                found[name] = min(times, key=times.__getitem__)
                ratio = f", {times[variant.config] / times[found[name]]:.2f} x as fast as {variant.config}" if variant.config in times else ""
                print(f"{name}: {found[name]}{ratio}", file=sys.stderr)
    return found


def candidates(variant: Variant) -> Iterator[Config]:
    """The variant's own configuration, then others whose steps divide its width."""
    yield variant.config
    fixed = variant.op == "project_normalize"  # a program holds whole rows of the result
    for m, d, warps, stages in itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        other = replace(variant.config, block_m=m, block_d=d, num_warps=warps, num_stages=stages)
        if other != variant.config and variant.d % d == 0 and not (fixed and m * other.block_n > 2**14):
            yield other


def workload(variant: Variant, device: torch.device, rows: int) -> Call:
    """A call of the variant's operator on random tensors of its named shape, or a smaller one."""
    generator = torch.Generator("cpu").manual_seed(0)
    dtype = next(t for t, name in NAMES.items() if name == variant.dtype)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")

    def unit(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(normal(count, variant.d), dim=-1).to(device)

    if variant.op == "project_normalize":
        h, V = unit(160 * rows).to(dtype), torch.linalg.qr(normal(variant.d, 128))[0].to(device, dtype)
        if variant.direction == "forward":
            return lambda: project_normalize(h, V, dtype)
        grad = torch.ones(len(h), 128, dtype=torch.float32, device=device)
        return lambda: torch.ops.rerank_kernels.project_normalize_backward(grad, h, V)
    count = 100 * rows if variant.op == "similarity_topk" else 160 * rows
    x, scales = reference.quantize(unit(count), dtype) if dtype in reference.LARGEST else (unit(count).to(dtype), None)
    if variant.op == "similarity_topk":
        queries = unit(16)
        return lambda: similarity_topk(queries, x, min(100, count), scales=scales)
    q, ends = unit(32), torch.arange(0, count + 1, 160, dtype=torch.int64, device=device)
    arguments = q.to(dtype if scales is None else torch.float16), torch.tensor([0, 32], dtype=torch.int64, device=device), x, ends
    pairs = torch.stack([torch.zeros_like(ends[1:]), torch.arange(rows, dtype=torch.int64, device=device)], 1)
    if variant.direction == "forward":
        return lambda: subspace_attention(*arguments, pairs, 0.1, scales)
    grad = torch.ones(32 * rows, dtype=torch.float32, device=device)
    return lambda: torch.ops.rerank_kernels.subspace_attention_backward(grad, *arguments, pairs, 0.1, scales)


def write(path: Path, found: dict[str, Config], gpu: str) -> None:
    """Adds configurations to the file, under a temporary name first; what it held for other keys stays."""
    old = json.loads(path.read_text()) if path.exists() else {}
    configs = old.get("configs", {}) | {name: asdict(config) for name, config in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, "configs": configs}, indent=1, sort_keys=True))
    os.replace(temporary, path)
