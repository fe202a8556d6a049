"""--grid: collections × models × methods × settings as one run, with a results folder for each cell.

The TOML file holds options, as a --config file does. Each key of its table [grid] has a list of values, and every combination is a cell.
Cells share the cache. A collection is encoded once for all cells that read it, in the richest detail that any of them needs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rerank_lab.errors import ModelError, UserError
from rerank_lab.eval.journal import RESULTS
from rerank_lab.eval.results import read as read_results
from rerank_lab.eval.settings import CLUSTER_OPTIONS, OVERRIDES, EvalSettings, flags, parse, parser, read_toml
from rerank_lab.eval.system import System, names
from rerank_lab.eval.table import interval
from rerank_lab.files import Json, write_atomically
from rerank_lab.models.base import Detail
from rerank_lab.models.kinds import needs_of

log = logging.getLogger("rerank_lab")
GRID, GRID_SCHEMA = "grid.json", 1
# Options that are the same for all cells.
FIXED = {"grid", "config", "list", "out", "resume", "overwrite", "cache", "cache_gb", "no_cache", "kernels", "threads", *CLUSTER_OPTIONS}


@dataclass(frozen=True)
class GridCell:
    """One evaluation of a grid.

    Attributes:
        name: of its folder; unique in the grid.
        values: option → value on each axis, as the TOML file gives it.
        options: the cell's settings.
    """

    name: str
    values: dict[str, Json]
    options: EvalSettings


def read(path: Path, argv: Sequence[str], out: Path) -> tuple[dict[str, list[Any]], list[GridCell]]:
    """Reads a grid.

    Args:
        path: the TOML file.
        argv: flags of the command line; they win over the file.
        out: the folder of the grid.

    Returns:
        its axes, option → values, and its cells. Collections change slowest.

    Raises:
        UserError: the file is unreadable, has no table [grid] or has unknown keys; or a flag also sets an axis.
    """
    table = read_toml(path)
    given = table.pop("grid", None)
    axes = {key.replace("-", "_"): values for key, values in given.items()} if isinstance(given, dict) else {}
    if len(axes) < len(given or ()):
        raise UserError(f"{path}: a key of [grid] stands there twice, with - and with _")
    if not axes:
        raise UserError(f'{path}: no table [grid] with lists of values, as in dataset = ["numpydoc", "path/to/scifact"]')
    known = {a.dest: a for a in parser()._actions if a.option_strings and a.dest not in FIXED | {"help", "sweep"}}
    for key, values in axes.items():
        if key not in known:
            raise UserError(f"{path}: [grid] {key} cannot be an axis; valid: {', '.join(known)}")
        if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
            raise UserError(f"{path}: [grid] {key} must be a list of values, each once, not {values!r}")
        for value in values:
            flags({key: value}, path, parser())
        if any(word.partition("=")[0] in known[key].option_strings for word in argv):
            raise UserError(f"{known[key].option_strings[0]} is an axis of {path}: change it there, or leave the flag out")
    order = sorted(axes, key=lambda key: key not in ("dataset", "split"))
    every = flags(table, path, parser())
    cells, names = [], set[str]()
    for values in itertools.product(*(axes[key] for key in order)):
        own = dict(zip(order, values))
        stem = _capped(",".join(_short(key, value) for key, value in own.items() if len(axes[key]) > 1 or key == "dataset") or "cell")
        name = next(n for n in itertools.chain([stem], (f"{stem},{i}" for i in itertools.count(2))) if n not in names)
        names.add(name)
        cells.append(GridCell(name, own, parse([*every, *flags(own, path, parser()), *argv, f"--out={out / name}"])))
    return {key: axes[key] for key in order}, cells


def run(options: EvalSettings, argv: Sequence[str], out: Path, evaluate: Callable[[EvalSettings], str], check: Callable[[EvalSettings], object]) -> str:
    """Evaluates every cell that is not finished.

    Args:
        options, argv: of the command line.
        out: the folder of the grid.
        evaluate: makes one cell's folder.
        check: raises UserError if a cell's options cannot be run.

    Returns:
        the text for stdout.

    Raises:
        UserError: wrong input. If it is found only when cells run, the other cells are finished.
        ModelError: some cells failed; the others are finished.
    """
    assert options.grid is not None
    axes, cells = read(options.grid, _without_grid(argv), out)
    problems = dict.fromkeys(problem for cell in cells for problem in _problems(cell, check))
    if problems:
        raise UserError("; ".join(problems))
    _begin(out, axes, cells, options)
    cells = [replace(cell, options=replace(cell.options, detail=detail)) for cell, detail in zip(cells, details(cells))]
    failed: dict[str, Exception] = {}
    with tqdm(total=len(cells), desc="grid", unit="cell", disable=None) as bar:
        for cell in cells:
            bar.set_postfix_str(cell.name)
            try:
                evaluate(cell.options)
            except (UserError, ModelError, MemoryError, OSError, torch.OutOfMemoryError) as error:
                failed[cell.name] = error
                log.warning("%s: failed, going on with the others: %s", cell.name, str(error) or type(error).__name__)
            bar.update()
    text = "\n".join([*_table(out, cells), "", f"Written to {out}", f"As a page with plots: python -m rerank_lab.report {out}", ""])
    if failed:
        print(text)
        kind = UserError if all(isinstance(error, UserError) for error in failed.values()) else ModelError
        raise kind(f"{len(failed)} of {len(cells)} cells: {', '.join(failed)} (why stands above); the same command with --resume does these again")
    return text


def details(cells: Sequence[GridCell]) -> Iterator[Detail]:
    """For each cell, the richest detail that any cell with the same texts and the same model needs."""
    shared = ("dataset", "split", "model", "subspace", "document_prompt", "truncate_dim", "device", "runtime", "precision", "max_tokens_per_doc")
    keys = [tuple(repr(getattr(cell.options, name)) for name in shared) for cell in cells]
    wanted = [_detail(cell.options) for cell in cells]
    return (max(d for k, d in zip(keys, wanted) if k == key) for key in keys)


def _detail(options: EvalSettings) -> Detail:
    """The richest detail that a cell's methods read of a document."""
    cross = options.model_cross != "none"
    needs = needs_of(options.model_cross) if cross else None
    needed = needs[1] if needs is not None and needs[0] == options.model else Detail.POOLED
    found = Detail.POOLED
    for system in map(System.parse, options.methods or names(cross)):
        if not system.remote:
            found = max(found, needed if system.crossed else Detail.POOLED, Detail.TOKENS if system.method.tokens else Detail.POOLED)
    return found


def _without_grid(argv: Sequence[str]) -> list[str]:
    """The flags without --grid and --out: those that apply to each cell."""
    taken, kept = argparse.ArgumentParser(add_help=False, allow_abbrev=False), list(argv)
    taken.add_argument("--grid"), taken.add_argument("--out")
    return taken.parse_known_args(kept)[1]


def _problems(cell: GridCell, check: Callable[[EvalSettings], object]) -> Iterator[str]:
    try:
        check(cell.options)
    except UserError as error:
        yield str(error)


def _begin(out: Path, axes: Mapping[str, list[Any]], cells: Sequence[GridCell], options: EvalSettings) -> None:
    """Writes grid.json, or checks that the grid is still the one that was begun."""
    about = {"schema": GRID_SCHEMA, "axes": axes, "cells": [{"name": cell.name, "values": cell.values} for cell in cells]}
    path = out / GRID
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file, not a folder")
    if options.overwrite:
        _forget(out, path, cells)
    if path.exists() and not options.overwrite:
        if not options.resume:
            raise UserError(f"{out} holds a grid: --resume to go on, --overwrite to replace, or another --out")
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} does not read back ({error}); start again with --overwrite") from None
        if before != json.loads(json.dumps(about)):
            raise UserError(f"{path} is of another grid; give it as it was, --overwrite, or another --out")
    elif out.exists() and not path.exists() and any(out.iterdir()) and not options.overwrite:
        raise UserError(f"--out {out} holds something else than a grid; another --out, or --overwrite")
    try:
        write_atomically(path, json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None


def _forget(out: Path, path: Path, cells: Sequence[GridCell]) -> None:
    """Marks all cells as unfinished and removes the cells of an older grid, so that no old result passes for a new one."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # from a damaged grid.json, older cells are not known
        for name in {cell["name"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]} - {cell.name for cell in cells}:
            if (out / name / RESULTS).is_file() or (out / name / "partial").is_dir():
                shutil.rmtree(out / name)
    for cell in cells:
        (out / cell.name / RESULTS).unlink(missing_ok=True)


def _table(out: Path, cells: Sequence[GridCell]) -> list[str]:
    """One line for each cell: the best mean, and the row that reached it."""
    lines = []
    for cell in cells:
        try:
            results = read_results(out / cell.name / RESULTS)
        except UserError:
            lines += textwrap.wrap(f"{cell.name}: not finished", 80, subsequent_indent="    ")
            continue
        primary = results.primary
        top = max(results.rows, key=lambda row: row.measures[primary])
        said = f"{cell.name}: {primary} {interval(top.measures[primary], top.ci95[primary])} by {top.label}"
        lines += textwrap.wrap(said, 80, subsequent_indent="    ")
    return lines


def _capped(name: str) -> str:
    """A name short enough for file systems, also as the folder of the report's files."""
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _short(key: str, value: Any) -> str:
    """A value as a part of a folder's name."""
    if value == "":
        value = "none"
    if isinstance(value, list):
        value = "+".join(map(str, value))
    text = str(value)
    if key in ("dataset", "model", "model_cross", "subspace"):
        text = Path(text.partition(":")[2] if text.startswith(("hf:", "irds:")) else text).name.removesuffix(".zip").removesuffix(".safetensors")
    elif isinstance(value, (bool, int, float)) or key in OVERRIDES:
        text = f"{key}={text}"
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.")[:60] or "x"
