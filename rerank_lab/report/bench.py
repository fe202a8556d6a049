"""What share of the machine's rates the operators reach, from what rerank_kernels.bench printed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rerank_lab.errors import UserError
from rerank_lab.files import decode
from rerank_lab.report.blocks import Cell, Section, Table, Text
from rerank_lab.report.content import number

LIMITS = "Kernels and the machine's limits"


@dataclass(frozen=True)
class Timed:
    """One way to do a task.

    Attributes:
        status: "ok", or why it has no times.
        slower: its time over ours.
        of_roofline: share of the roofline; None on a CPU.
        of_gemm, of_read: shares of the rates of GEMM and of reading; None on a GPU.
    """

    name: str
    status: str
    slower: float | None = None
    of_roofline: float | None = None
    of_gemm: float | None = None
    of_read: float | None = None


@dataclass(frozen=True)
class Task:
    """A task and those who did it, ours first."""

    task: str
    rows: list[Timed]


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark: its command, its tasks, and what it ran on: the GPU, or None and the machine's CPU, by which code and how many threads."""

    command: str
    tasks: list[Task]
    machine: str
    implementation: str
    threads: int
    gpu: str | None = None


def read(path: Path) -> Bench:
    """What python -m rerank_kernels.bench --json printed.

    Raises:
        UserError: it is something else, or not there.
    """
    try:
        return decode(Bench, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"--bench {path}: not what python -m rerank_kernels.bench --json prints ({type(error).__name__}: {error})") from None


def roofline(bench: Bench, name: str, level: int) -> Section:
    """The shares as a table; `name` is the file's."""
    rows = [
        [Cell(task.task), Cell(row.name), *(number(value, ".2f") for value in (row.slower, row.of_roofline, row.of_gemm, row.of_read))]
        for task in bench.tasks
        for row in task.rows
        if row.status == "ok"
    ]
    columns = ["work", "by", "time over ours", "of roofline", "of GEMM rate", "of reading rate"]
    where = bench.gpu or f"{bench.machine}, {bench.implementation}, {bench.threads} threads"
    text = f"From {name}: {bench.command}, on {where}. Ours is the first of each work. GEMM and reading rates are those of torch on the same machine in the same run."
    return Section(LIMITS, level, [Table(columns, rows), Text([text])])
