"""The output of rerank_kernels.bench as a section of the report: what share of the machine's limits the operators reach."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rerank_lab.errors import UserError
from rerank_lab.files import decode
from rerank_lab.report.blocks import Cell, Paragraph, Section, Table
from rerank_lab.report.content import number

LIMITS = "Kernels and the machine's limits"


@dataclass(frozen=True)
class BenchTiming:
    """How one implementation did a task.

    Attributes:
        name: of the implementation.
        status: "ok", or why it has no times.
        slower: its time divided by ours.
        of_roofline: share of the roofline; None on a CPU.
        of_gemm, of_read: shares of the machine's GEMM rate and of its reading rate; None on a GPU.
    """

    name: str
    status: str
    slower: float | None = None
    of_roofline: float | None = None
    of_gemm: float | None = None
    of_read: float | None = None


@dataclass(frozen=True)
class BenchTask:
    """A task, and the implementations that did it, ours first."""

    task: str
    rows: list[BenchTiming]


@dataclass(frozen=True)
class BenchRun:
    """One run of the benchmark.

    Attributes:
        command: that ran it.
        tasks: with their times.
        machine: the CPU.
        implementation, threads: of our operators on the CPU.
        gpu: its name; None: the run was on the CPU.
    """

    command: str
    tasks: list[BenchTask]
    machine: str
    implementation: str
    threads: int
    gpu: str | None = None


def read(path: Path) -> BenchRun:
    """Reads the output of python -m rerank_kernels.bench --json.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        return decode(BenchRun, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"--bench {path}: not what python -m rerank_kernels.bench --json prints ({type(error).__name__}: {error})") from None


def roofline(bench: BenchRun, name: str, level: int) -> Section:
    """The shares as a table.

    Args:
        bench: the run.
        name: of its file.
        level: of the section's heading.
    """
    rows = [
        [Cell(task.task), Cell(row.name), *(number(value, ".2f") for value in (row.slower, row.of_roofline, row.of_gemm, row.of_read))]
        for task in bench.tasks
        for row in task.rows
        if row.status == "ok"
    ]
    columns = ["work", "by", "time over ours", "of roofline", "of GEMM rate", "of reading rate"]
    where = bench.gpu or f"{bench.machine}, {bench.implementation}, {bench.threads} threads"
    text = f"From {name}: {bench.command}, on {where}. Ours is the first of each work. GEMM and reading rates are those of torch on the same machine in the same run."
    return Section(LIMITS, level, [Table(columns, rows), Paragraph([text])])
