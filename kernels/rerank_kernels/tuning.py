"""What `tune` does: it times every configuration of every variant of an operator, and writes the fastest."""

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

from . import OPERATORS, use_backend
from .configs import NAMES, Config, Variant, architecture, key, tuned

Call = Callable[[], object]


def run(ops: Sequence[str], device: torch.device, timer: Callable[[Call], float], rows: int = 1000) -> dict[str, Config]:
    """The fastest configuration of every variant of these operators, by key.

    Args:
        ops: operators that the table calls tuned.
        device: where to launch.
        timer: a call → its time, in any unit.
        rows: documents of 160 tokens; a search has a hundred documents for each, a projection 160 tokens.
    """
    arch, found = architecture(device), dict[str, Config]()
    for op in ops:
        module = import_module(f".{OPERATORS[op].module}", __package__)
        for variant in module.variants(arch):
            name = key(op, variant.direction, arch, variant.dtype, variant.d)
            if variant.op != op or variant.dtype not in NAMES.values() or name in found:
                continue
            times: dict[Config, float] = {}
            before = tuned().get(name)
            for config in candidates(variant):
                tuned()[name] = config
                try:
                    with use_backend("triton"):
                        times[config] = timer(module.workload(variant, device, rows))
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
    for m, d, warps, stages in itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        other = replace(variant.config, block_m=m, block_d=d, num_warps=warps, num_stages=stages)
        if other != variant.config and variant.d % d == 0 and m * other.block_n <= variant.largest_tile:
            yield other


def write(path: Path, found: dict[str, Config], gpu: str) -> None:
    """Adds configurations to the file, under a temporary name first; what it held for other keys stays."""
    old = json.loads(path.read_text()) if path.exists() else {}
    configs = old.get("configs", {}) | {name: asdict(config) for name, config in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, "configs": configs}, indent=1, sort_keys=True))
    os.replace(temporary, path)
