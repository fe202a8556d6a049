"""How `bench` times tasks: the contenders of each take turns, on the CPU or on a GPU."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import OPERATORS, bench_peers, cpu
from .bench_tasks import Call, Task
from .inspect import GPUS

ON_GPU = 5e-2  # tolerance of a result's distance from ours, in fp16
Row = dict[str, Any]


def machine(threads: int) -> dict[str, Any]:
    """What the times are of: processor, versions, threads, and which code answers on the CPU."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, **bench_peers.versions()}
    for name in ("rerank_lab", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"
    return {"machine": machine, "versions": found, "threads": threads, "implementation": cpu.implementation()}


def tasks(quick: bool, cuda: bool) -> list[Task]:
    """The tasks of all operators that have some, by the names of the files that declare them."""
    files = sorted({operator.bench for operator in OPERATORS.values() if operator.bench})
    return [task for file in files for task in import_module(f".{file}", __package__).tasks(quick, cuda)]


def on_cpu(quick: bool, with_peers: bool, threads: int) -> list[dict[str, Any]]:
    """A dictionary for each task, with a row for each contender."""
    return [_on_cpu(task, 3 if quick else 11, 256 if quick else 2048, with_peers, threads) for task in tasks(quick, cuda=False)]


def _on_cpu(task: Task, rounds: int, side: int, with_peers: bool, threads: int) -> dict[str, Any]:
    a, x = torch.randn(side, side, dtype=torch.float32, device="cpu"), task.tensors()
    matrix, title = x[task.matrix], task.title(x)
    calls: dict[str, Call] = {"GEMM": lambda: a @ a, "read": lambda: matrix.sum(), **task.on_cpu(x)}
    print(title, file=sys.stderr)
    ours = np.asarray(calls[task.ours[0]]())
    results = {name: np.asarray(call()) for name, call in calls.items()}
    names = task.peers if with_peers else ()
    absent = {name: bench_peers.missing(name) for name in names}
    remote = {name: bench_peers.Remote(name, task, threads) for name in names if absent[name] is None}
    times: dict[str, list[float]] = {name: [] for name in (*calls, *remote)}
    order = list(times)
    for _ in range(rounds):
        for before, (name, taken) in zip([order[-1], *order], times.items()):
            # The threads of the one before spin for a while: torch's for a few ms, others' pools for 200.
            time.sleep(0.25 if before in remote or before.startswith("numpy") else 0.02)
            taken.append(remote[name].seconds() if name in remote else bench_peers.seconds(calls[name]))
    for name, process in remote.items():
        process.close()
        absent[name], results[name] = process.problem, np.asarray(process.result)
    median = {name: statistics.median(values) for name, values in times.items()}
    flop, gemm, read = 2 * matrix.numel() * task.products, 2 * side**3 / median["GEMM"], matrix.nbytes / median["read"]
    rows: list[Row] = []
    for name in (*calls, *names):
        if name in ("GEMM", "read"):
            continue
        if absent.get(name):
            rows.append({"name": name, "status": absent[name]})
            continue
        seconds = median[name]
        row: Row = {"name": name, "status": "ok", "ms": seconds * 1e3, "slower": seconds / median[task.ours[0]], "of_gemm": flop / seconds / gemm}
        row["of_read"] = matrix.nbytes / seconds / read
        if name not in task.unlike:
            row["difference"] = float(np.abs(results[name] - ours).max())
            row["wrong"] = not row["difference"] <= task.tolerance
        rows.append(row)
    return {"task": title, "rounds": rounds, "gemm_gflops": gemm / 1e9, "read_gbs": read / 1e9, "rows": rows}


def on_gpu(quick: bool, with_peers: bool) -> list[dict[str, Any]]:
    """The same on CUDA, in fp16."""
    do_bench = import_module("triton.testing").do_bench
    name = torch.cuda.get_device_name()
    known = next((gpu for gpu in GPUS.values() if gpu.name.split()[0] in name), None)
    block = torch.empty(2**28, dtype=torch.int8, device="cuda")
    other = torch.empty_like(block)
    bandwidth, peak = (
        (known.bandwidth, known.fp16) if known else (2 * block.nbytes / (do_bench(lambda: other.copy_(block), return_mode="median") / 1e3), float("inf"))
    )
    found = []
    for task in tasks(quick, cuda=True):
        x = {key: value.cuda().half() if value.is_floating_point() else value.cuda() for key, value in task.tensors().items()}
        matrix, title, absent = x[task.matrix], task.title(x), dict[str, str | None]()
        calls = task.on_gpu(x)
        for peer, call in task.peers_on_gpu(x).items() if with_peers else ():
            absent[peer] = bench_peers.missing(peer)
            calls |= {peer: call} if absent[peer] is None else {}
        print(title, file=sys.stderr)
        rows: list[Row] = [{"name": peer, "status": status} for peer, status in absent.items() if status]
        flop, base, ours = 2 * matrix.numel() * task.products, 0.0, torch.empty(0, dtype=torch.float32, device="cpu")
        for peer, call in calls.items():
            try:
                result, ms = call(), do_bench(call, return_mode="median")
            except Exception as problem:
                if peer in task.ours:
                    raise
                rows.append({"name": peer, "status": f"{type(problem).__name__}: {problem}".splitlines()[0]})
                continue
            base, ours = base or ms, ours if base else result
            gpu_ms, roofline = _device_ms(call), max(matrix.nbytes / bandwidth, flop / peak)
            row = {"name": peer, "status": "ok", "ms": ms, "slower": ms / base, "gpu_ms": gpu_ms, "of_roofline": roofline / gpu_ms * 1e3}
            row |= {"gbs": matrix.nbytes / gpu_ms / 1e6, "tflops": flop / gpu_ms / 1e9}
            if peer not in task.unlike:
                row["difference"] = float((result.float() - ours.float()).abs().max())
                row["wrong"] = not row["difference"] <= ON_GPU
            rows.append(row)
        found.append({"task": title, "bandwidth_gbs": bandwidth / 1e9, "bandwidth_from": known.name if known else "a copy on this GPU", "rows": rows})
    return found


def _device_ms(call: Call, calls: int = 20) -> float:
    """Milliseconds that a call's kernels take, without launches and waiting: the mean over so many calls."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(float(event.device_time_total) for event in profile.key_averages()) / calls / 1e3
