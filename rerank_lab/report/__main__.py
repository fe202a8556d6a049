"""python -m rerank_lab.report: results folders → report.md and report.html, with every figure."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

try:
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
except ImportError as error:
    sys.exit(f"rerank_lab: error: reports need {error.name}: pip install 'rerank_lab[report]'")

from tqdm import tqdm

from rerank_lab import cli
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.shards import default_place
from rerank_lab.options import natural, path_of, place_of
from rerank_lab.report import bench, content, grid, grid_page, render
from rerank_lab.report.blocks import Block, Section, Strong, Text, plots
from rerank_lab.report.compare import comparison
from rerank_lab.report.examples import Source, aligned, examples, loaded_model
from rerank_lab.report.figures import saved
from rerank_lab.report.load import Loaded, collection, is_grid, load, newest
from rerank_lab.report.verdict import sentence, verdict
from rerank_lab.run import write_atomically

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
    """Every option with its default."""
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
    """The command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(given)
    options.command = options.command or shlex.join(["python", "-m", "rerank_lab.report", *given])
    try:
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


def make(options: argparse.Namespace) -> str:
    """Writes what the options describe; what to say of it."""
    if options.compare:
        return _compare(options)
    folders = options.results or [newest(Path("results"))]
    if grids := [folder for folder in folders if is_grid(folder)]:
        if len(folders) > 1:
            raise UserError(f"{grids[0]} is a grid, which has a page of its own: name it alone, or name cells of it")
        return _grid(grids[0], options)
    given = {name: path for name, _, path in (text.partition("=") for text in options.dataset)}
    every = load(folders)
    names = [one.result.dataset.name for one in every]
    if wrong := [text for text in options.dataset if "=" not in text or text.partition("=")[0] not in names]:
        raise UserError(f"--dataset {wrong[0]!r}: write NAME=PATH, NAME one of {', '.join(names)}")
    if len(every) > 1 and options.out is None:
        raise UserError(f"{len(every)} results need --out DIR for the report of them all")
    speeds = None if options.bench is None else bench.read(options.bench)
    quoted = {*names} if options.quote == "all" else {*options.quote.split(",")} - {"none"}
    if unknown := quoted - {*names}:
        raise UserError(f"--quote {', '.join(sorted(unknown))}: not among the collections {', '.join(names)}")
    out = options.out or every[0].folder
    report = Section(content.title(every), 1, content.overview(every, options.command))
    for one in every:
        errors = _examples(one, options, given, one.result.dataset.name in quoted)
        if len(every) == 1:
            report.blocks += content.sections(one, 2, errors, None if speeds is None else bench.roofline(speeds, options.bench.name, 3))
        else:
            pointer = None if speeds is None else Text([f"What the kernels reach of the machine's limits: under “{bench.LIMITS}”, at the end."])
            report.blocks.append(Section(one.name, 2, list(content.sections(one, 3, errors, pointer))))
    if speeds is not None and len(every) > 1:
        report.blocks.append(bench.roofline(speeds, options.bench.name, 2))
    extra = {}
    if options.latex:
        tables = [render.latex(content.main_table(one), f"{one.primary} on {one.name}.", f"tab:{one.stem}") for one in every]
        extra["report.tex"] = "\n".join(tables)
    said = ["".join(sentence(one)) for one in every]
    return "\n".join([*map(wrapped, said), _write(out, "report", report, extra)])


def _grid(folder: Path, options: argparse.Namespace) -> str:
    beside = [name for name in ("bench", "dataset", "cache") if getattr(options, name)]
    beside += [name for name, none in (("quote", ("all", "none")), ("examples", (10, 0))) if getattr(options, name) not in none]  # its page has neither
    if beside:
        raise UserError(f"{folder} is a grid, which takes --out, --command and --latex alone beside it, not {', '.join(beside)}; its cells take them")
    found = grid.read(folder)
    if found.unfinished:
        print(f"rerank_lab: {grid_page.unfinished(found)}", file=sys.stderr)
    report = grid_page.page(found, options.command)
    extra = {"report.tex": render.latex(grid_page.across(found), "Every row of the grid.", "tab:grid")} if options.latex else {}
    said = ["".join(grid_page.finding(one)) for one in found.collections]
    return "\n".join([*map(wrapped, said), _write(options.out or folder, "report", report, extra)])


def _compare(options: argparse.Namespace) -> str:
    defaults = vars(parser().parse_args([]))
    beside = [name for name in ("results", "latex", "bench", "quote", "dataset", "examples", "cache") if getattr(options, name) != defaults[name]]
    if beside:
        raise UserError(f"--compare takes --out and --command alone beside it, not {', '.join(beside)}")
    if options.out is None:
        raise UserError("--compare needs --out DIR")
    if grids := [str(folder) for folder in options.compare if is_grid(folder)]:
        raise UserError(f"--compare takes two results, and {grids[0]} is a grid: name two of its cells")
    a, b = (load([folder])[0] for folder in options.compare)
    report = comparison(a, b, options.command)
    said = ["".join(block.parts) for block in report.blocks if isinstance(block, Text) and isinstance(block.parts[0], Strong)]
    return "\n".join([*map(wrapped, said), _write(options.out, "comparison", report, {})])


def wrapped(text: str) -> str:
    """For a terminal of 80 columns."""
    return textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _examples(one: Loaded, options: argparse.Namespace, given: dict[str, str], quote: bool) -> list[Block]:
    """The queries that gained and lost, as far as collection and model are to be had; what is not is said."""
    if not options.examples:
        return [Text(["Left out (--examples 0)."])]
    said: list[Block] = [] if quote else [Text(["This collection's texts are not quoted here: ids alone."])]
    dataset = reranker = None
    try:
        dataset = collection(one, given)
        if quote and any(map(aligned, one.result.rows)):
            reranker = loaded_model(one, options.cache or default_place())
    except (UserError, ModelError) as error:
        if dataset is None and one.result.dataset.name in given:
            raise
        said.append(Text([f"Left out: {error}."]))
        print(f"rerank_lab: {one.name}: {'no texts' if dataset is None else 'no token alignments'}: {error}", file=sys.stderr)
    return said + examples(one, Source(dataset, reranker, quote, options.examples), verdict(one).use, lambda items, name: tqdm(items, desc=name, disable=None))


def _write(out: Path, name: str, report: Section, extra: dict[str, str]) -> str:
    """Figures first, the page last, each whole or not there."""
    files: dict[str, str | bytes] = {f"figures/{plot.name}.png": saved(plot.figure, "png") for plot in plots(report)}
    files |= {**extra, f"{name}.md": render.markdown(report), f"{name}.html": render.html(report)}
    for file, text in files.items():  # all are made before any is written
        write_atomically(out / file, text)
    return f"Written to {out / name}.html and {name}.md"


if __name__ == "__main__":
    sys.exit(cli.run(main))
