"""How fast the operators are, beside torch, numpy and other libraries, on the
same tensors in the same run:

python -m rerank_kernels.bench --peers
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

EPILOG = """Each task's contenders take turns, each time the second of two calls; times are
medians over the rounds. "vs ours" is a contender's time over ours, "of GEMM"
its FLOP/s over those of a large square product, "of read" its bytes/s over
those of a plain sum of the same matrix; GEMM and read are measured in the same
rounds. |diff| is the largest difference to our result. On a GPU "ms" is a call
as a caller waits for it, "GPU ms" its kernels alone, and "of roof" the time
that the bytes or the products take at the named rate over that.

exit codes: 0 done (also where there is no GPU), 1 a result differs from ours,
2 wrong arguments"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m rerank_kernels.bench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--peers", action="store_true", help="compare with other libraries too (pip install 'rerank_lab[peers]')")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that all runs, not how fast")
    parser.add_argument("--threads", type=int, help="threads of every contender (default: torch's choice)")
    args = parser.parse_args(arguments)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, not {args.threads}")
    import torch

    from .bench_timing import machine, on_cpu, on_gpu

    threads = args.threads or torch.get_num_threads()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = sys.argv[1:] if arguments is None else arguments
    report = {"command": " ".join(["python -m rerank_kernels.bench", *given]), "device": device, **machine(threads), "tasks": []}
    torch.set_num_threads(threads)
    if device == "cpu":
        report["tasks"] = on_cpu(args.quick, args.peers, threads)
    elif torch.cuda.is_available():
        report["gpu"], report["tasks"] = torch.cuda.get_device_name(), on_gpu(args.quick, args.peers)
    else:
        report["note"] = "there is no GPU here, so nothing was timed; --device cpu times the CPU path"
    print(json.dumps(report, indent=1) if args.json else _table(report))
    wrong = [f"{row['name']} ({task['task']}): {row['difference']:.1e}" for task in report["tasks"] for row in task["rows"] if row.get("wrong")]
    if wrong:
        print("results that differ from ours: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def _table(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    head = [
        report["command"],
        report["machine"],
        f"{report['implementation']}, {report['threads']} threads" if report["device"] == "cpu" else report.get("gpu"),
    ]
    lines = [line for line in (*head, report.get("note")) if line]
    while versions:  # 80 columns
        cut = len(versions) if len(versions) <= 80 else versions.rindex(" ", 0, 80)
        lines.append(versions[:cut].strip())
        versions = versions[cut:]
    for task in report["tasks"]:
        gpu = "bandwidth_gbs" in task
        scale = f"roofline: {task['bandwidth_gbs']:.0f} GB/s by {task['bandwidth_from']}" if gpu else f"GEMM {task['gemm_gflops']:.0f} GFLOP/s, "
        scale += "" if gpu else f"read {task['read_gbs']:.1f} GB/s; medians of {task['rounds']}"
        columns = ("GPU ms", "of roof", "GB/s") if gpu else ("of GEMM", "of read")
        lines += ["", task["task"], scale, f"{'':32}{'ms':>9}{'vs ours':>9}" + "".join(f"{c:>9}" for c in columns) + f"{'|diff|':>10}"[: 10 if not gpu else 3]]
        for row in task["rows"]:
            if row["status"] != "ok":
                lines.append(f"{row['name']:32}  {row['status']}"[:80])
                continue
            keys = ("gpu_ms", "of_roofline", "gbs") if gpu else ("of_gemm", "of_read")
            numbers = "".join(f"{row[key]:9.{3 if key == 'gpu_ms' else 2}f}" for key in keys)
            difference = f"{row['difference']:10.1e}" if "difference" in row and not gpu else ""
            lines.append(f"{row['name']:32}{row['ms']:9.3f}{row['slower']:9.2f}{numbers}{difference}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        from rerank_lab import cli  # for terminals and pipes; the package itself needs nothing of it
    except ImportError:
        sys.exit(main())
    sys.exit(cli.run(main, "rerank_kernels"))
