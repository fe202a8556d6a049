"""Writes reports/kernels.md: what inspect and bench print (about four minutes).

Needs the extra `peers`; nothing else should run meanwhile. Where there is no
GPU, its part comes from another machine: there, with a GPU,
  python -m rerank_kernels.bench --device cuda --peers >gpu.txt
and here
  python experiments/benchmarks/report_kernels.py --gpu gpu.txt
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from rerank_lab.cli import path_of
from rerank_lab.environment import describe
from rerank_lab.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "CPU: ours and other libraries": ["rerank_kernels.bench", "--device", "cpu", "--peers"],
    "GPU: ours and other libraries": ["rerank_kernels.bench", "--device", "cuda", "--peers"],
    "What the compiler makes of the kernels": ["rerank_kernels.inspect"],
}


def main() -> int:
    """Runs the commands one after another, and writes the report if all succeed."""
    parser = argparse.ArgumentParser(
        "python experiments/benchmarks/report_kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=path_of, metavar="FILE", help="what the GPU's bench printed elsewhere")
    path: Path | None = parser.parse_args().gpu
    try:
        gpu = None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--gpu {path}: {error}")
    machine = describe(torch.device("cpu"))
    versions = ", ".join(f"{name} {machine.packages[name]}" for name in ("torch", "triton"))
    own = "python experiments/benchmarks/report_kernels.py" + ("" if gpu is None else " --gpu FILE")
    elsewhere = "" if gpu is None else " The GPU's part was printed on the machine that it names."
    made_on = f"Made by `{own}` at commit {machine.commit} on {machine.cpu}, {machine.cpus} CPUs, {versions}."
    parts = [f"# Kernels\n\n{made_on} Times are one run on a shared machine: read the ratios.{elsewhere}\n"]
    for title, arguments in COMMANDS.items():
        command = f"python -m {' '.join(arguments)}"
        if gpu is not None and "cuda" in arguments:
            printed = gpu
        else:
            print(command, file=sys.stderr)
            done = subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, check=False, env=os.environ | {"COLUMNS": "80"})
            if done.returncode:
                print(f"report_kernels: {command} ended with {done.returncode}; nothing written", file=sys.stderr)
                return 1
            printed = done.stdout
        parts.append(f"## {title}\n\n```\n$ {command}\n{printed.rstrip()}\n```\n")
    write_atomically(ROOT / "reports" / "kernels.md", "\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
