"""Describes what a result was computed on: versions, hardware, threads, commit, and the cluster if there was one."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rerank_kernels import backend, cpu

REPORTED_PACKAGES = (
    "rerank_lab", "torch", "triton", "transformers", "tokenizers", "numpy", "scipy", "ir_measures", "pytrec_eval-terrier", "bm25s", "PyStemmer",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything about machine and software that a figure may depend on. It names no user, host or path.

    Attributes:
        python: Python's version.
        packages: name → version.
        platform: operating system and processor architecture.
        cpu: the processor's name.
        cpus: how many processors this process may use; None: unknown.
        threads: CPU threads that torch uses.
        memory_gb: memory of the machine; None: unknown.
        device: where the models run: cpu, mps, or a GPU's name.
        kernels: the implementation of the operators on that device, as the function `kernels` names it.
        commit: of the checkout, with a + if tracked files have changed; None for an installed package.
    """

    python: str
    packages: dict[str, str]
    platform: str = ""
    cpu: str
    cpus: int | None
    threads: int | None
    memory_gb: float | None = None
    device: str
    kernels: str
    commit: str | None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster that did the work.

    Attributes:
        name: of the executor.
        version: of the cluster's software.
        workers: how many worker processes had room.
        resources: name → amount that each worker has.
        nodes: machines that the cluster had.
        calls: machine → how many calls it answered.
    """

    name: str
    version: str = ""
    workers: int
    resources: dict[str, float] = field(default_factory=dict)
    nodes: int = 0
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Environment(Machine):
    """The machine that the models ran on, and what ran them.

    Attributes:
        vector_cache: where vectors were kept: disk, memory or none.
        peak_memory_per_method: true if each row's peak memory is its own, false if it counts from the start of the process;
            None: unknown.
        executor: the cluster that did the work; None: the command's own process.
        timed_by: names of the executors that timed rankings.
    """

    vector_cache: str
    peak_memory_per_method: bool | None = None
    executor: Cluster | None = None
    timed_by: list[str] = field(default_factory=list)


def describe(device: torch.device) -> Machine:
    """Describes this machine, with the models on this device."""
    return Machine(
        python=platform.python_version(),
        packages={name: found for name in REPORTED_PACKAGES if (found := _version(name))},
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=_memory_gb(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        kernels=kernels(device),
        commit=_commit(),
    )


def kernels(device: torch.device) -> str:
    """Which implementation of the operators runs on this device: "reference", "triton", or "cpu" with its variant (c-avx512, torch …).

    Raises:
        ValueError: the chosen backend cannot run on this device.
    """
    name = backend.resolve(torch.empty(0, dtype=torch.float32, device=device))
    return f"cpu ({cpu.implementation()})" if name == "cpu" else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + if tracked files have changed; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True, check=True).stdout
        return commit + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
