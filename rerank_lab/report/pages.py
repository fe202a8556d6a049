"""Turns results folders into report files, and says on the terminal what they show."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from tqdm import tqdm

from rerank_lab.cache.places import default_place
from rerank_lab.errors import ModelError, UserError
from rerank_lab.files import write_atomically
from rerank_lab.report import bench, content, grid, grid_page, render
from rerank_lab.report.blocks import Block, Paragraph, Section, Strong, plots
from rerank_lab.report.compare import comparison
from rerank_lab.report.examples import ExampleSource, aligned, examples, loaded_model
from rerank_lab.report.figures import saved
from rerank_lab.report.load import ResultsFolder, collection, is_grid, load, newest
from rerank_lab.report.verdict import sentence, verdict


def make(options: argparse.Namespace) -> str:
    """Writes the report that the options describe. Returns the text for stdout.

    Raises:
        UserError: wrong options or unreadable results. ModelError: a model failed.
    """
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
            pointer = None if speeds is None else Paragraph([f"What the kernels reach of the machine's limits: under “{bench.LIMITS}”, at the end."])
            report.blocks.append(Section(one.name, 2, list(content.sections(one, 3, errors, pointer))))
    if speeds is not None and len(every) > 1:
        report.blocks.append(bench.roofline(speeds, options.bench.name, 2))
    extra = {}
    if options.latex:
        tables = [render.latex(content.main_table(one), f"{one.primary} on {one.name}.", f"tab:{one.stem}") for one in every]
        extra["report.tex"] = "\n".join(tables)
    summary = ["".join(sentence(one)) for one in every]
    return "\n".join([*map(wrapped, summary), _write(out, "report", report, extra)])


def _grid(folder: Path, options: argparse.Namespace) -> str:
    beside = [name for name in ("bench", "dataset", "cache") if getattr(options, name)]
    beside += [
        name for name, none in (("quote", ("all", "none")), ("examples", (10, 0))) if getattr(options, name) not in none
    ]  # the page of a grid has neither texts nor examples
    if beside:
        raise UserError(f"{folder} is a grid, which takes --out, --command and --latex alone beside it, not {', '.join(beside)}; its cells take them")
    found = grid.read(folder)
    if found.unfinished:
        print(f"rerank_lab: {grid_page.unfinished(found)}", file=sys.stderr)
    report = grid_page.page(found, options.command)
    extra = {"report.tex": render.latex(grid_page.across(found), "Every row of the grid.", "tab:grid")} if options.latex else {}
    summary = ["".join(grid_page.finding(one)) for one in found.collections]
    return "\n".join([*map(wrapped, summary), _write(options.out or folder, "report", report, extra)])


def _compare(options: argparse.Namespace) -> str:
    if grids := [str(folder) for folder in options.compare if is_grid(folder)]:
        raise UserError(f"--compare takes two results, and {grids[0]} is a grid: name two of its cells")
    a, b = (load([folder])[0] for folder in options.compare)
    report = comparison(a, b, options.command)
    summary = ["".join(block.parts) for block in report.blocks if isinstance(block, Paragraph) and isinstance(block.parts[0], Strong)]
    return "\n".join([*map(wrapped, summary), _write(options.out, "comparison", report, {})])


def wrapped(text: str) -> str:
    """A text wrapped to 80 columns."""
    return textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _examples(one: ResultsFolder, options: argparse.Namespace, given: dict[str, str], quote: bool) -> list[Block]:
    """Blocks about queries that gained and lost. If the collection or the model cannot be loaded, a block says so."""
    if not options.examples:
        return [Paragraph(["Left out (--examples 0)."])]
    notes: list[Block] = [] if quote else [Paragraph(["This collection's texts are not quoted here: ids alone."])]
    dataset = reranker = None
    try:
        dataset = collection(one, given)
        if quote and any(map(aligned, one.result.rows)):
            reranker = loaded_model(one, options.cache or default_place())
    except (UserError, ModelError) as error:
        if dataset is None and one.result.dataset.name in given:
            raise
        notes.append(Paragraph([f"Left out: {error}."]))
        print(f"rerank_lab: {one.name}: {'no texts' if dataset is None else 'no token alignments'}: {error}", file=sys.stderr)
    return notes + examples(
        one, ExampleSource(dataset, reranker, quote, options.examples), verdict(one).use, lambda items, name: tqdm(items, desc=name, disable=None)
    )


def _write(out: Path, name: str, report: Section, extra: dict[str, str]) -> str:
    """Writes the files atomically, figures first and the page last. Returns a line for stdout."""
    files: dict[str, str | bytes] = {f"figures/{plot.name}.png": saved(plot.figure, "png") for plot in plots(report)}
    files |= {**extra, f"{name}.md": render.markdown(report), f"{name}.html": render.html(report)}
    for file, text in files.items():  # all contents are ready before the first file is written
        write_atomically(out / file, text)
    return f"Written to {out / name}.html and {name}.md"
