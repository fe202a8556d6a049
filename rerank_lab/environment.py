"""What a result was made on: versions, hardware, threads, commit, and who did the work."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rerank_kernels import backend, cpu

PACKAGES = ("rerank_lab", "torch", "triton", "transformers", "tokenizers", "numpy", "scipy", "ir_measures", "pytrec_eval-terrier", "bm25s", "PyStemmer")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything about machine and software that a figure may depend on; names no user, host or path.

    Attributes:
        python, platform: its version, and system with kind of processor.
        packages: name → version.
        cpu, cpus: the processor's name, and how many this process may use; None: not known.
        threads: of torch.
        memory_gb: of the machine; None: not known.
        device: where models run: cpu, mps, or a GPU's name.
        kernels: what answers the operators' calls there, as `kernels` has it.
        commit: of the checkout, with + where it has changes; None for an installed package.
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
    """A cluster that did the work."""

    name: str
    version: str = ""
    workers: int
    resources: dict[str, float] = field(default_factory=dict)
    nodes: int = 0
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Environment(Machine):
    """Machine and software where models ran, and who timed the rankings.

    Attributes:
        vector_cache: where vectors were kept: disk, memory or none.
        peak_memory_per_method: whether a peak is a row's own; otherwise the process's since its start. None: not said.
        executor: the cluster that did the work; None: the process of the command.
        timed_by: names of the executors that timed rankings.
    """

    vector_cache: str
    peak_memory_per_method: bool | None = None
    executor: Cluster | None = None
    timed_by: list[str] = field(default_factory=list)


def describe(device: torch.device) -> Machine:
    """The machine with models on this device."""
    return Machine(
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
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
    """What answers the operators' calls on this device now: "reference", "triton", or "cpu" with what it runs there (c-avx512, torch …).

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
    """The checkout's commit, with + where it has changes; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True, check=True).stdout
        return commit + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
