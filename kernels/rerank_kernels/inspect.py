"""What the compiler makes of every configuration that ships, without a GPU: python -m rerank_kernels.inspect --help.

Each configuration is compiled ahead of time; ptxas says registers, stack and spills, the disassembly the instructions.
Times and shares are a bound by formula, not a measurement: no kernel takes less than its bytes over the GPU's bandwidth
or its FLOPs over the matrix rate, and no more of the bandwidth is used than the documents' tiles in flight ask for in
one latency of memory (Little's law). A real kernel stays below that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import OPERATORS
from .names import ARCHS, DTYPES

if TYPE_CHECKING:
    from .configs import Variant

COMPILED = [name for name, operator in OPERATORS.items() if operator.compiled]
MODULES = list(dict.fromkeys(OPERATORS[name].module for name in COMPILED))
PEERS, PEERS_OF = "inspect_peers", "subspace_attention"  # the file of other packages' kernels, and the operator whose work they do
LATENCY = 500e-9  # of GPU memory without load: a longer one would only lower the bound
Job = tuple[str, str, int]  # module, architecture, place among its variants
Row = dict[str, Any]


@dataclass(frozen=True)
class GPU:
    """A GPU's published figures: bytes/s, dense FLOP/s in fp16, TF32 and on plain fp32 units, multiprocessors, bytes of shared memory in one."""

    name: str
    bandwidth: float
    fp16: float
    tf32: float
    fp32: float
    multiprocessors: int
    shared: int


GPUS = {
    "sm_80": GPU("A100 80GB SXM", 2.039e12, 312e12, 156e12, 19.5e12, 108, 164 * 1024),
    "sm_90": GPU("H100 SXM", 3.35e12, 989e12, 494.5e12, 67e12, 132, 228 * 1024),
    "sm_100": GPU("B200", 8e12, 2250e12, 1125e12, 80e12, 148, 228 * 1024),
}


def resident_blocks(arch: str, registers: int, shared_bytes: int, threads: int, tensor_columns: int = 0) -> int:
    """Blocks that fit one multiprocessor at once, by registers, shared memory, threads and columns of tensor memory; 0 is no launch."""
    warps = threads // 32
    # 65,536 registers, given out by 256 a warp to four schedulers that hold equally many warps.
    by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = GPUS[arch].shared // (-(-shared_bytes // 128) * 128 + 1024)
    by_tensor = 512 // tensor_columns if tensor_columns else 32
    return min(by_registers, by_shared, by_tensor, 2048 // threads, 32)


def resources(log: str) -> tuple[int, int, int]:
    """Registers, stack bytes and spilled bytes (stores and loads) from what `ptxas -v` prints of one kernel."""
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    if frame is None or used is None:
        raise ValueError(f"ptxas says no registers or stack: {log.strip()[-300:]}")
    return int(used[1]), int(frame[1]), int(frame[2]) + int(frame[3])


def instructions(sass: str) -> dict[str, Any]:
    """Matrix instructions by kind, asynchronous and bulk copies in a disassembly."""
    found = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE))
    return {
        "mma": {n: c for n, c in sorted(found.items()) if n.endswith("MMA")},
        "async_copies": found["LDGSTS"],
        "bulk_copies": sum(c for n, c in found.items() if re.match(r"U?BLK(CP|RED)|UTMA(LDG|STG|REDG)", n)),
    }


def bound(variant: Variant, arch: str, blocks: int, mma: bool) -> dict[str, Any]:
    """The least seconds that memory and arithmetic allow, and which share of each the kernel then uses at most."""
    gpu = GPUS[arch]
    rate = (gpu.tf32 if variant.dtype == "fp32" else gpu.fp16) if mma else gpu.fp32
    if "tf32x3" in variant.constants.values():
        rate /= 3 if mma else 1
    c, reach = variant.config, 1.0
    if variant.direction == "forward" and mma:
        width = {"fp32": 4, "int8": 1, "fp8": 1}.get(variant.dtype, 2)
        in_flight = blocks * max(c.num_stages - 1, 1) * c.block_m * c.block_d * width * gpu.multiprocessors
        reach = min(1.0, in_flight / (gpu.bandwidth * LATENCY)) or 1.0
    memory, matrix = variant.bytes / gpu.bandwidth, variant.flops / rate
    seconds = max(memory / reach, matrix)
    by = "memory" if memory / reach >= matrix else "matrix"
    return {"by": by, "seconds": seconds, "bandwidth_share": memory / seconds, "matrix_share": matrix / seconds, "in_flight_limit": reach}


def measure(variant: Variant, arch: str) -> Row:
    """Compiles one variant. Returns its row of the report without what names it.

    Raises:
        Exception: the compiler's, for a kernel that does not compile.
    """
    if isinstance(variant.kernel, Exception):
        raise variant.kernel
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    types = {n: t.removesuffix(":16") for n, t in variant.signature.items()}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(variant.signature.values()) if t.startswith("*") or t.endswith(":16")}
    source = ASTSource(variant.kernel, types, dict(variant.constants), attrs)
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    printed = StringIO()
    with knobs.nvidia.scope(), redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=target, options=options)
        ptx, cubin = built.asm["ptx"], built.asm["cubin"]
        if "bytes stack frame" not in printed.getvalue():  # Triton's cache keeps the kernel, but not what ptxas said of it
            backend = make_backend(target)
            cubin = backend.make_cubin(ptx, {}, backend.parse_options(options), target.arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(path)], capture_output=True, text=True, check=True).stdout
    registers, stack, spills = resources(printed.getvalue())
    threads = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
    found, shared, tensor = instructions(sass), int(built.metadata.shared), int(getattr(built.metadata, "tmem_size", 0) or 0)
    count = int(threads[1]) if threads else variant.config.num_warps * 32
    blocks = resident_blocks(arch, registers, shared, count, tensor)
    return {
        "registers": registers, "stack_bytes": stack, "spill_bytes": spills, "shared_bytes": shared, "tensor_columns": tensor, **found,
        "threads": count, "blocks_per_sm": blocks, "occupancy": blocks * count / 2048, "bound": bound(variant, arch, blocks, bool(found["mma"])),
    }  # fmt: skip


@lru_cache
def _variants(module: str, arch: str) -> list[Variant]:
    return list(import_module(f".{module}", __package__).variants(arch))


def _jobs(archs: Sequence[str], ops: Sequence[str], dtypes: Sequence[str], direction: str, peers: bool) -> list[Job]:
    modules = [*MODULES, *[PEERS] * (peers and (not ops or PEERS_OF in ops))]
    every = [(m, arch, i, v) for arch in archs for m in modules for i, v in enumerate(_variants(m, arch))]
    wanted = [j for j in every if (not ops or j[0] == PEERS or j[3].op in ops) and (not dtypes or not set(j[3].dtype.split(">")).isdisjoint(dtypes))]
    return [j[:3] for j in wanted if direction in ("", j[3].direction)]


def _row(job: Job) -> Row:
    module, arch, index = job
    v = _variants(module, arch)[index]
    row = {"op": v.op, "direction": v.direction, "arch": arch, "dtype": v.dtype, "d": v.d, "config": str(v.config), "tiles": asdict(v.config)}
    row |= {"shape": v.shape, "bytes": v.bytes, "flops": v.flops}
    if module == PEERS:
        from . import inspect_peers

        package, _, name, to_longest = inspect_peers.KERNELS[v.op]
        tiles = inspect_peers.tiles_over_needed(v.config.block_m, to_longest)
        row |= {"package": package, "version": inspect_peers.installed(package), "kernel": name, "tiles_over_needed": round(tiles, 3)}
    try:
        return row | measure(v, arch)
    except Exception as error:  # noqa: BLE001 - whatever stops one kernel is reported beside those that compile
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def report(
    archs: Sequence[str] = ARCHS, ops: Sequence[str] = (), dtypes: Sequence[str] = (), direction: str = "", peers: bool = True, workers: int | None = None
) -> dict[str, list[Row]]:
    """Compiles in worker processes.

    Args:
        archs: of ARCHS.
        ops, dtypes, direction: only these; empty is all.
        peers: other packages' kernels too, where installed. They do the work of subspace attention and go with it.
        workers: processes, as many as CPU cores by default.

    Returns:
        {"rows": …, "peers": …}, in the order of architectures, operators and their variants.
    """
    # Workers compile, so they must not import triton as its interpreter, whatever this process runs.
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    found: dict[str, list[Row]] = {"rows": [], "peers": []}
    try:
        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = pool.submit(_jobs, tuple(archs), tuple(ops), tuple(dtypes), direction, peers).result()
            for done, (job, row) in enumerate(zip(jobs, pool.map(_row, jobs)), 1):
                found["peers" if job[0] == PEERS else "rows"].append(row)
                if sys.stderr.isatty():
                    print(f"\rcompiled {done} of {len(jobs)}", end="\n" if done == len(jobs) else "", file=sys.stderr, flush=True)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    return found


def _cells(row: Row, label: str) -> list[str]:
    if "error" in row:
        return [label, row["config"], f"does not compile: {row['error']}"]
    b, copies = row["bound"], [f"{row[k]}{k[0]}" for k in ("async_copies", "bulk_copies") if row[k]]
    cells = [label, row["config"], row["registers"], row["stack_bytes"], row["spill_bytes"], f"{row['shared_bytes'] / 1024:.0f}"]
    cells += ["+".join(f"{n} {kind}" for kind, n in row["mma"].items()) or "-", "+".join(copies) or "-", row["blocks_per_sm"]]
    cells += [f"{row['bytes'] / 1e6:.0f}", f"{row['flops'] / 1e9:.1f}", f"{b['seconds'] * 1e6:.0f}"]
    return [str(c) for c in [*cells, *(f"{100 * b[k]:.0f}" for k in ("bandwidth_share", "matrix_share"))]]


def table(rows: Sequence[Row], peers: Sequence[Row] = ()) -> str:
    """The rows for a terminal of 80 columns, by architecture, operator, direction and width."""
    titles, lines = ["", "tiles", "reg", "stk", "spl", "kB", "matrix", "cpy", "blk", "MB", "GF", "µs", "bw%", "mm%"], []
    order = list(dict.fromkeys((r["arch"], r["op"], r["direction"]) for r in rows))
    arch = None
    for (place, d, shape), group in groupby(*_sorted(rows, lambda r: (order.index((r["arch"], r["op"], r["direction"])), r["d"], r["shape"]))):
        if arch != order[place][0]:
            arch, gpu = order[place][0], GPUS[order[place][0]]
            lines += [f"{arch}: {gpu.name}, {gpu.bandwidth / 1e12:g} TB/s, {gpu.fp16 / 1e12:g} TFLOP/s in fp16, {gpu.tf32 / 1e12:g} in TF32", ""]
        cells = [titles, *(_cells(r, r["dtype"]) for r in group)]
        if order[place][1:] == (PEERS_OF, "forward"):
            cells += [_cells(r, r["op"]) for r in peers if (r["arch"], r["d"]) == (arch, d)]
        widths = [max(len(c[i]) for c in cells if len(c) == len(titles)) for i in range(len(titles))]
        lines += textwrap.wrap(f"{order[place][1]} {order[place][2]}: {shape}" + f", d {d}" * (d > 0 and f"d {d}" not in shape), 80)
        for c in cells:
            aligned = [x.ljust(w) if i in (0, 1, 6) else x.rjust(w) for i, (x, w) in enumerate(zip(c, widths))]
            lines.append(" ".join(aligned if len(c) == len(titles) else c).rstrip())
        lines.append("")
    return "\n".join(lines)


def _sorted(rows: Sequence[Row], by: Callable[[Row], Any]) -> tuple[list[Row], Callable[[Row], Any]]:
    return sorted(rows, key=by), by


LEGEND = textwrap.fill(
    "tiles: rows of documents or tokens x queries or columns x step of d / warps / stages. reg: registers a thread. stk, spl: bytes of "
    "stack and of spills. kB: shared memory a block. matrix: matrix instructions. cpy: asynchronous (a) and bulk (b) copies. blk: blocks "
    "resident on a multiprocessor. MB, GF: bytes and FLOPs (matrix products) of the shape. µs: no kernel can be faster, by formula; bw%, "
    "mm%: at most this share of the GPU's bandwidth and matrix rate is used then. These are bounds, not measurements.",
    80,
)


def _parser() -> argparse.ArgumentParser:
    def names(known: Sequence[str]) -> Any:
        def parse(text: str) -> list[str]:
            found = text.split(",")
            unknown = [x for x in found if x not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
            return found

        return parse

    parser = argparse.ArgumentParser(
        prog="python -m rerank_kernels.inspect",
        description="Compiles every shipped configuration ahead of time, without a GPU, and prints\nwhat the compiler made of it.\n\n" + LEGEND,
        epilog="Other packages' MaxSim kernels (late-interaction-kernels: LIK, flash-maxsim: FM)\n"
        "stand beside these where they are installed. Configurations that tune wrote are\n"
        "used where there are any. A dtype like fp16>int8 is read as one and written as\n"
        "the other. Exit code: 0, 1 if something does not compile, 2 for wrong input.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=names(ARCHS), default=list(ARCHS), metavar="A,B", help=f"architectures (default: {','.join(ARCHS)})")
    parser.add_argument("--op", type=names(COMPILED), default=[], metavar="A,B", help=f"only these operators: {', '.join(COMPILED)}")
    parser.add_argument("--dtype", type=names(DTYPES), default=[], metavar="A,B", help=f"only these dtypes: {', '.join(DTYPES)}")
    parser.add_argument("--direction", choices=["forward", "backward"], default="", help="only this one")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other packages' kernels too, where installed")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that compile (default: as many as CPU cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, not {args.workers}")
    try:
        found = report(args.arch, args.op, args.dtype, args.direction, args.peers, args.workers)
    except ValueError as error:  # a file of tuned configurations that is none
        parser.error(str(error))
    if not found["rows"]:
        parser.error("nothing ships for this choice of --arch, --op, --dtype and --direction")
    if args.json:
        print(json.dumps(found))
    else:
        print(table(found["rows"], found["peers"]), LEGEND, sep="\n")
        tiles = {r["op"]: f"{r['op']} ({r['package']} {r['version']}) {r['tiles_over_needed']:.2f}" for r in found["peers"]}
        if tiles:
            ours = "Document tiles computed over those needed, on lengths of 20 to 300: here 1.00"
            print("", textwrap.fill("; ".join([ours, *tiles.values()]), 80), sep="\n")
        elif args.peers:
            print("\nNo peers installed: pip install late-interaction-kernels flash-maxsim")
    failed = [r for r in found["rows"] if "error" in r]
    for r in failed:
        print(f"{r['op']} {r['direction']} {r['arch']} {r['dtype']} d {r['d']} {r['config']} does not compile: {r['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        from rerank_lab import cli  # for terminals and pipes; the package itself needs nothing of it
    except ImportError:
        sys.exit(main())
    sys.exit(cli.run(main, "rerank_kernels"))
