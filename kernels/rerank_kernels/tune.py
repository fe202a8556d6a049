"""Times launch configurations on this machine's GPU and writes the fastest:

python -m rerank_kernels.tune

Kernels take their configurations from a table that was made without timing.
What this command writes overrides the table for one architecture; nothing is
ever timed at a call.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import OPERATORS

TUNED = [name for name, operator in OPERATORS.items() if operator.tuned]
EPILOG = """Takes minutes. Put the file elsewhere with --out, and name it in
RERANK_KERNELS_CONFIGS when kernels run; delete it to go back to the table that
ships. Operators and widths that it does not name keep the table's
configuration.

exit codes: 0 done, 1 no GPU here or nothing could be launched, 2 wrong input"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m rerank_kernels.tune", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=TUNED, action="append", metavar="NAME", help=f"only this: {', '.join(TUNED)}; may be given again")
    parser.add_argument(
        "--out",
        type=lambda name: Path(os.path.expanduser(name)),
        metavar="FILE",
        help="what is written; entries of other GPUs stay (default: $RERANK_KERNELS_CONFIGS, or configs.json in ~/.cache/rerank_kernels)",
    )
    args = parser.parse_args(arguments)
    import torch

    from .configs import tuned, tuned_path
    from .tuning import run, write

    out = args.out or tuned_path()
    try:
        tuned()
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("tune: there is no GPU here, so nothing can be timed; kernels use the configurations that ship", file=sys.stderr)
        return 1
    try:
        write(out, {}, torch.cuda.get_device_name())  # known now, not after minutes
    except (OSError, ValueError, AttributeError) as error:
        parser.error(f"--out {out} cannot be written: {error}")
    device = torch.device("cuda")
    found = run(args.op or TUNED, device, lambda call: float(import_module("triton.testing").do_bench(call, return_mode="median")))
    if not found:
        print("tune: no configuration could be launched", file=sys.stderr)
        return 1
    write(out, found, torch.cuda.get_device_name())
    print(f"{len(found)} configurations written to {out}")
    return 0


if __name__ == "__main__":
    try:
        from rerank_lab import cli  # for terminals and pipes; the package itself needs nothing of it
    except ImportError:
        sys.exit(main())
    sys.exit(cli.run(main, "rerank_kernels"))
