"""Collections in BEIR's layout: a folder, a zip archive, or one bundled with the package."""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rerank_lab.datasets.dataset import Collection, Judgements, grade_of, record_text
from rerank_lab.errors import UserError
from rerank_lab.files import decompressed, hidden

BUNDLED = Path(__file__).parent.parent / "data"


def bundled_names() -> list[str]:
    """Names of the collections that are bundled with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/corpus.jsonl"))


def folder_collection(folder: Path) -> Collection:
    """The collection in a folder of BEIR's layout.

    Raises:
        UserError: corpus, queries or qrels are missing.
    """
    missing = [n for n in ("corpus.jsonl", "queries.jsonl", "qrels") if not (folder / n).exists() and not (folder / f"{n}.gz").exists()]
    if missing:
        raise UserError(f"{folder}: not in BEIR's layout, {', '.join(missing)} missing")
    places = [folder / name for name in ("corpus.jsonl", "corpus.jsonl.gz", "queries.jsonl", "queries.jsonl.gz")]
    places += [Path(place) / name for place, _, names in os.walk(folder / "qrels", followlinks=True) for name in names]
    return _beir_collection(folder.resolve().name, {p.relative_to(folder).as_posix(): p for p in places if p.is_file()}, lambda p: p.open("rb"), str)


def zip_collection(path: Path) -> Collection:
    """The collection in a zip archive of one folder in BEIR's layout.

    Raises:
        UserError: the archive is damaged, or does not hold exactly one collection.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise UserError(f"{path}: not a whole zip archive: {error or type(error).__name__}") from error
    names = {name.replace("\\", "/"): name for name in archive.namelist()}  # some Windows programs write backslashes
    found = {match[1] for name in names if (match := re.fullmatch(r"(.*/|)corpus\.jsonl(\.gz)?", name)) and not hidden(name.removeprefix(match[1]))}
    roots = {root for root in found if not hidden(root)} or found
    if len(roots) != 1:
        raise UserError(f"{path}: needs exactly one corpus.jsonl inside, found {len(roots)}")
    root = roots.pop()
    members = {name.removeprefix(root): own for name, own in names.items() if name.startswith(root)}
    return _beir_collection(path.stem, members, archive.open, lambda n: f"{path}!{n}")


def _beir_collection(name: str, files: dict[str, Any], open_file: Callable[[Any], Any], label: Callable[[Any], str]) -> Collection:
    files = {relative: file for relative, file in files.items() if not hidden(relative)}

    def lines(relative: str) -> Iterator[tuple[str, str]]:
        if relative not in files and f"{relative}.gz" in files:
            relative = f"{relative}.gz"
        if relative not in files:
            raise UserError(f"{name}: {relative} is missing")
        try:
            with open_file(files[relative]) as file:
                for number, raw in enumerate(decompressed(file, label(files[relative])), 1):
                    where = f"{label(files[relative])}:{number}"
                    try:
                        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
                    if line.strip():
                        yield where, line
        except UserError:
            raise
        except Exception as error:  # zipfile and each of its decoders raise errors of their own for a damaged archive
            raise UserError(f"{label(files[relative])} cannot be read: {error or type(error).__name__}") from error

    def texts(relative: str) -> Iterator[tuple[str, str, str]]:
        for where, line in lines(relative):
            yield *_record(line, where), where

    def judgements(path: str) -> Judgements:
        return _read_judgements(lines(path))

    splits = dict.fromkeys(path.removesuffix(".gz") for path in sorted(files) if re.fullmatch(r"qrels/.+\.tsv(\.gz)?", path, re.DOTALL))
    return Collection(
        name,
        lambda: texts("corpus.jsonl"),
        lambda: texts("queries.jsonl"),
        {path.removeprefix("qrels/").removesuffix(".tsv"): partial(judgements, path) for path in splits},
    )


def _record(line: str, where: str) -> tuple[str, str]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one object") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object")
    return record_text(value, where)


def _read_judgements(lines: Iterable[tuple[str, str]]) -> Judgements:
    for i, (where, line) in enumerate(lines):
        text = line.rstrip("\r\n")
        try:  # quotes as BEIR's own loader reads them
            parts = next(csv.reader([text], delimiter="\t", strict=True)) if '"' in text else text.split("\t")
        except csv.Error:
            parts = []
        if i == 0 and len(parts) >= 3 and (parts[-1].strip()[:1].isalpha() or not any(character.isdecimal() for character in parts[-1])):
            continue  # the header
        if len(parts) == 4:  # TREC's format has an unused second column
            parts = [parts[0], parts[2], parts[3]]
        if len(parts) != 3 or not parts[0].strip() or not parts[1].strip() or grade_of(parts[2]) is None:
            raise UserError(f"{where}: needs query-id, corpus-id and a whole-number score, separated by tabs: {line.strip()[:80]!r}")
        yield parts[0].strip(), parts[1].strip(), parts[2], where
