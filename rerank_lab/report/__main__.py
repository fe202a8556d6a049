"""python -m rerank_lab.report: results folders → report.md and report.html, with every figure."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from rerank_lab import cli
from rerank_lab.cli import natural, path_of, place_of
from rerank_lab.errors import ModelError, UserError

EPILOG = """\
examples:
  python -m rerank_lab.report
      the newest results, beside them: report.md, report.html, figures/
  python -m rerank_lab.report results/a results/b --out reports/ab
      several evaluations on one page
  python -m rerank_lab.report results/grid
      a grid of evaluations, whole: what each of its axes changes
  python -m rerank_lab.report --compare results/fp32 results/bf16 --out cmp
      the same candidates twice: what changed, and whether it mattered
  python -m rerank_lab.report results/a --latex
      and report.tex, the table for a paper (needs booktabs)

exit codes: 0 done, 1 failed while running, 2 wrong input
"""


def parser() -> argparse.ArgumentParser:
    """The command line of the report."""
    p = argparse.ArgumentParser(
        "python -m rerank_lab.report",
        description="Turns results of rerank_lab.eval into report.md and one page, report.html.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("results", nargs="*", type=path_of, metavar="RESULTS", help="results folders, or the folder of one grid (default: the newest in results/)")
    p.add_argument("--compare", nargs=2, type=path_of, metavar=("A", "B"), help="two results of the same candidates instead: B against A")
    p.add_argument("--out", type=path_of, metavar="DIR", help="where to write (default: the results folder, where there is one alone)")
    p.add_argument("--latex", action="store_true", help="write report.tex too: the table of each evaluation")
    p.add_argument("--bench", type=path_of, metavar="FILE", help="what python -m rerank_kernels.bench --json printed: shares of the machine's limits")
    p.add_argument(
        "--quote",
        default="all",
        metavar="all|none|NAME,…",
        help="collections whose texts may stand in the report; the others give figures alone (default: all)",
    )
    p.add_argument("--dataset", action="append", default=[], metavar="NAME=PATH", help="where a collection lies now, if no longer where the evaluation had it")
    p.add_argument("--examples", type=natural, default=10, metavar="N", help="queries shown that gained and that lost most, 0 for none (default: 10)")
    p.add_argument("--command", metavar="TEXT", help="what the report names as the command that made it (default: this one)")
    p.add_argument("--cache", type=place_of, metavar="DIR|URL", help="vector cache, for token alignments (default: $RERANK_LAB_CACHE or ~/.cache/rerank_lab)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    given = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(given)
    options.command = options.command or shlex.join(["python", "-m", "rerank_lab.report", *given])
    try:
        _check(options)
        try:
            import jinja2  # noqa: F401
            import matplotlib  # noqa: F401
        except ImportError as error:
            sys.exit(f"rerank_lab: error: reports need {error.name}: pip install 'rerank_lab[report]'")
        from rerank_lab.report.pages import make

        print(make(options))
        return 0
    except UserError as error:
        print(f"rerank_lab: error: {error}", file=sys.stderr)
        return 2
    except (ModelError, OSError, MemoryError) as error:
        print(f"rerank_lab: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrerank_lab: interrupted; the same command makes the report", file=sys.stderr)
        return 130


def _check(options: argparse.Namespace) -> None:
    """Checks the options of --compare against each other, before anything is loaded."""
    if not options.compare:
        return
    defaults = vars(parser().parse_args([]))
    beside = [name for name in ("results", "latex", "bench", "quote", "dataset", "examples", "cache") if getattr(options, name) != defaults[name]]
    if beside:
        raise UserError(f"--compare takes --out and --command alone beside it, not {', '.join(beside)}")
    if options.out is None:
        raise UserError("--compare needs --out DIR")


if __name__ == "__main__":
    sys.exit(cli.run(main))
