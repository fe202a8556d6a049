"""What `bench` times: each task's contenders in turns, on the CPU or a GPU."""

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

from rerank_kernels import bench_peers as peers
from rerank_kernels import cpu, similarity_topk, subspace_attention
from rerank_kernels.inspect import GPUS

TOLERANCE = {"ragged": 2e-4, "search": 2e-5, "cuda": 5e-2}  # sums over 32 tokens, dot products, the same in fp16
TAU = 0.1
Row = dict[str, Any]


def machine(threads: int) -> dict[str, Any]:
    """What the times are of: processor, versions, threads, and which code answers on the CPU."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, **peers.versions()}
    for name in ("rerank_lab", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"
    return {"machine": machine, "versions": found, "threads": threads, "implementation": cpu.implementation()}


def on_cpu(quick: bool, with_peers: bool, threads: int) -> list[dict[str, Any]]:
    """A dictionary a task, with a row a contender."""
    rounds = 3 if quick else 11
    ragged = [peers.Ragged(d, 50 if quick else 1000) for d in (128, 384)]
    search = [peers.Search(queries, 2000 if quick else 100_000) for queries in (1, 64)]
    side = 256 if quick else 2048
    tasks: list[peers.Ragged | peers.Search] = [*ragged, *search]
    return [_time(task, rounds, side, with_peers, threads) for task in tasks]


def _local(task: peers.Ragged | peers.Search) -> dict[str, peers.Call]:
    """Contenders without another library, ours first."""
    x = task.tensors()
    if isinstance(task, peers.Search):
        queries, documents, k = x["queries"], x["documents"], task.k
        return {
            "similarity_topk": lambda: similarity_topk(queries, documents, k, metric="dot")[0],
            "similarity_topk, cosine": lambda: similarity_topk(queries, documents, k)[0],
            "torch matmul, topk": lambda: (documents @ queries.T).T.contiguous().topk(k).values,
            "numpy matmul, argpartition": lambda: peers.numpy_topk(queries.numpy(), documents.numpy(), k),
        }
    packed = x["q"], x["q_offsets"], x["tokens"], x["d_offsets"], x["pairs"]
    full, mask = peers.padded(x)
    owner = torch.repeat_interleave(torch.arange(task.documents, dtype=torch.int64, device="cpu"), x["d_offsets"].diff())
    return {
        "MaxSim": lambda: subspace_attention(*packed, 0.0).view(-1, task.Lq).sum(1),
        "soft attention": lambda: subspace_attention(*packed, TAU),
        "torch packed mm, scatter_reduce": lambda: peers.packed_maxsim(x, owner),
        "torch padded einsum": lambda: peers.padded_maxsim(x["q"], full, mask),
    }


def _time(task: peers.Ragged | peers.Search, rounds: int, side: int, with_peers: bool, threads: int) -> dict[str, Any]:
    a, x, ragged = torch.randn(side, side, dtype=torch.float32, device="cpu"), task.tensors(), isinstance(task, peers.Ragged)
    matrix = x["tokens" if ragged else "documents"]
    calls = {"GEMM": lambda: a @ a, "read": lambda: matrix.sum(), **_local(task)}
    title = (
        f"MaxSim, {task.Lq} query tokens x {task.documents:,} documents ({len(matrix):,} tokens), d = {task.d}, fp32"
        if isinstance(task, peers.Ragged)
        else f"top {task.k} of {task.documents:,} documents, {task.queries} {'query' if task.queries == 1 else 'queries'}, d = {task.d}, fp32"
    )
    print(title, file=sys.stderr)
    ours = np.asarray(calls["MaxSim" if ragged else "similarity_topk"]())
    results = {name: np.asarray(call()) for name, call in calls.items()}
    names = [name for name in peers.PEERS if with_peers and (("maxsim-cpu", "fast-maxsim").count(name) if ragged else name.startswith("faiss"))]
    absent = {name: peers.missing(name) for name in names}
    remote = {name: peers.Remote(name, task, threads) for name in names if absent[name] is None}
    times: dict[str, list[float]] = {name: [] for name in (*calls, *remote)}
    order = list(times)
    for _ in range(rounds):
        for before, (name, taken) in zip([order[-1], *order], times.items()):
            # Until the threads of the one before have stopped spinning: torch's do after a few ms, others' pools after 200.
            time.sleep(0.25 if before in remote or before.startswith("numpy") else 0.02)
            taken.append(remote[name].seconds() if name in remote else peers.seconds(calls[name]))
    for name, process in remote.items():
        process.close()
        absent[name], results[name] = process.problem, np.asarray(process.result)
    median = {name: statistics.median(values) for name, values in times.items()}
    base, tolerance = median["MaxSim" if ragged else "similarity_topk"], TOLERANCE["ragged" if ragged else "search"]
    flop, gemm, read = 2 * matrix.numel() * len(x["q" if ragged else "queries"]), 2 * side**3 / median["GEMM"], matrix.nbytes / median["read"]
    rows: list[Row] = []
    for name in (*calls, *names):
        if name in ("GEMM", "read"):
            continue
        if absent.get(name):
            rows.append({"name": name, "status": absent[name]})
            continue
        seconds = median[name]
        row: Row = {"name": name, "status": "ok", "ms": seconds * 1e3, "slower": seconds / base, "of_gemm": flop / seconds / gemm}
        row["of_read"] = matrix.nbytes / seconds / read
        if name != "soft attention":
            row["difference"] = float(np.abs(results[name] - ours).max())
            row["wrong"] = not row["difference"] <= tolerance
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
    tasks = []
    ragged: list[peers.Ragged | peers.Search] = [peers.Ragged(d, 50 if quick else 1000) for d in (128, 384)]
    ragged += [] if quick else [peers.Ragged(128, 20_000)]
    for task in [*ragged, *(peers.Search(queries, 2000 if quick else 100_000) for queries in (1, 64))]:
        x = {key: value.cuda().half() if value.is_floating_point() else value.cuda() for key, value in task.tensors().items()}
        matrix, absent = x["documents" if isinstance(task, peers.Search) else "tokens"], dict[str, str | None]()
        if isinstance(task, peers.Search):
            calls, title, lanes = _cuda_search(x, task.k), f"top {task.k} of {task.documents:,}, {task.queries} queries, d = {task.d}, fp16", task.queries
        else:
            calls, title, lanes = _cuda_ragged(x, task.Lq), f"MaxSim, {task.Lq} tokens x {task.documents:,} documents, d = {task.d}, fp16", task.Lq
            for peer, call in _cuda_peers(x).items() if with_peers else ():
                absent[peer] = peers.missing(peer)
                calls |= {peer: call} if absent[peer] is None else {}
        print(title, file=sys.stderr)
        rows: list[Row] = [{"name": peer, "status": status} for peer, status in absent.items() if status]
        flop, base, ours = 2 * matrix.numel() * lanes, 0.0, torch.empty(0, dtype=torch.float32, device="cpu")
        for peer, call in calls.items():
            try:
                result, ms = call(), do_bench(call, return_mode="median")
            except Exception as problem:
                if peer.startswith(("similarity_topk", "MaxSim", "soft attention")):
                    raise
                rows.append({"name": peer, "status": f"{type(problem).__name__}: {problem}".splitlines()[0]})
                continue
            base, ours = base or ms, ours if base else result
            gpu_ms, roofline = _device_ms(call), max(matrix.nbytes / bandwidth, flop / peak)
            row = {"name": peer, "status": "ok", "ms": ms, "slower": ms / base, "gpu_ms": gpu_ms, "of_roofline": roofline / gpu_ms * 1e3}
            row |= {"gbs": matrix.nbytes / gpu_ms / 1e6, "tflops": flop / gpu_ms / 1e9}
            if peer != "soft attention":
                row["difference"] = float((result.float() - ours.float()).abs().max())
                row["wrong"] = not row["difference"] <= TOLERANCE["cuda"]
            rows.append(row)
        tasks.append({"task": title, "bandwidth_gbs": bandwidth / 1e9, "bandwidth_from": known.name if known else "a copy on this GPU", "rows": rows})
    return tasks


def _device_ms(call: peers.Call, calls: int = 20) -> float:
    """Time of a call's kernels, launches and waiting left out: the mean of so many calls."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(float(event.device_time_total) for event in profile.key_averages()) / calls / 1e3


def _cuda_search(x: dict[str, torch.Tensor], k: int) -> dict[str, peers.Call]:
    queries, documents = x["queries"], x["documents"]
    compiled = torch.compile(lambda: (queries @ documents.T).topk(k).values)
    return {
        "similarity_topk": lambda: similarity_topk(queries, documents, k, metric="dot")[0],
        "torch matmul, topk": lambda: (queries @ documents.T).topk(k).values,
        "torch.compile of it": compiled,
    }


def _cuda_ragged(x: dict[str, torch.Tensor], Lq: int) -> dict[str, peers.Call]:
    packed, (full, mask) = (x["q"], x["q_offsets"], x["tokens"], x["d_offsets"], x["pairs"]), peers.padded(x)
    compiled = torch.compile(peers.padded_maxsim)
    return {
        "MaxSim": lambda: subspace_attention(*packed, 0.0).view(-1, Lq).sum(1),
        "soft attention": lambda: subspace_attention(*packed, TAU),
        "torch.compile of padded einsum": lambda: compiled(x["q"], full, mask),
    }


def _cuda_peers(x: dict[str, torch.Tensor]) -> dict[str, peers.Call]:
    cu_q, cu_d, longest = x["q_offsets"].int(), x["d_offsets"].int(), int(x["d_offsets"].diff().max())
    query, document = x["pairs"][:, 0].contiguous(), x["pairs"][:, 1].contiguous()

    def late_interaction() -> Any:
        score = import_module("late_interaction_kernels.score_pairs").score_pairs_packed
        return score(x["q"], x["tokens"], cu_q, cu_d, query, document, max_seqlen_q=len(x["q"]), max_seqlen_d=longest)

    def flash() -> Any:
        return import_module("flash_maxsim.flash_maxsim_varlen").flash_maxsim_packed(x["q"], x["tokens"], cu_d, longest)

    return {"late-interaction-kernels": late_interaction, "flash-maxsim": flash}
