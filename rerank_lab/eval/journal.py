"""The progress of an evaluation on disk. It survives Ctrl-C and kill -9.

The folder OUT/partial holds config.json and, for each row, a file with one line for each finished query.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.eval.records import Record
from rerank_lab.eval.results import RESULTS_SCHEMA, RUN_AGAIN, Results, parse
from rerank_lab.files import DecodeError, Json, write_atomically

RESULTS = "results.json"
REPORTS = ("report.md", "report.html", "report.tex")


def file_name(label: str) -> str:
    """A row's label as a file name: best:tau=0.05 → best-tau=0.05.

    A label with an address is shortened and gets a hash: http://a:80:best and http://a/80:best would otherwise share a name.
    """
    name = re.sub(r"[^\w.+=-]+", "-", label)
    return f"{name[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}" if "/" in label else name


class Journal:
    """The results folder of one evaluation while it runs.

    Args:
        out: the results folder.
        resume, overwrite: whether to go on with what the folder holds, or to replace it.

    Raises:
        UserError: the folder cannot be written, or it holds results or an interrupted run and neither flag was given.
    """

    def __init__(self, out: Path, *, resume: bool, overwrite: bool):
        self.out, self.partial, self.overwrite = out, out / "partial", overwrite
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: a file, not a folder")
        try:
            new = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            (out / ".probe").touch()
            (out / ".probe").unlink()
            if new:  # wrong input that is found later leaves no empty folder behind
                out.rmdir()
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
        # A run that replaces results has both until it ends: old results and a partial folder, which is removed last.
        done = (out / RESULTS).is_file() and not self.partial.is_dir()
        self.finished = done and not overwrite
        if not (overwrite or resume) and (done or self.partial.is_dir()):
            state = "holds results" if done else "holds an interrupted run"
            raise UserError(f"{out} {state}: --resume to go on, --overwrite to replace, or another --out")

    def results(self, config: Mapping[str, Json]) -> Results:
        """The finished results.

        Raises:
            UserError: results.json is damaged, or another version or configuration made it.
        """
        value = _load(self.out / RESULTS)
        if value.get("schema") != RESULTS_SCHEMA:
            raise UserError(f"{self.out}: results of schema {value.get('schema')}, and this version's is {RESULTS_SCHEMA}; start again with --overwrite")
        self._compare(value.get("config", {}), config, "the finished run")
        try:
            return parse(value)
        except DecodeError as problem:
            raise UserError(f"{self.out / RESULTS}: {problem}; {RUN_AGAIN}") from None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Records what the run depends on, or compares it with the interrupted run's record. Call it when all input has been checked.

        Raises:
            UserError: the interrupted run had another configuration, collection, model or candidates; the message names each.
        """
        path = self.partial / "config.json"
        if self.overwrite:
            shutil.rmtree(self.partial, ignore_errors=True)
        if path.is_file():
            self._compare(_load(path), config, "the interrupted run")
        else:
            write_atomically(path, json.dumps(config, indent=1))

    def _compare(self, before: Mapping[str, Any], config: Mapping[str, Any], what: str) -> None:
        now = json.loads(json.dumps(config))
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k, "absent") != now.get(k, "absent"))
        if changed:
            raise UserError(f"{self.out}: {what} differs in {', '.join(changed)}; give it as it was, --overwrite, or another --out")

    def records(self, label: str) -> list[Record]:
        """The records of a row's finished queries. A line that a kill cut short ends the list and is removed from the file."""
        path = self._path(label)
        if not path.is_file():
            return []
        found = list(_whole_lines(path))
        write_atomically(path, "".join(record.line() + "\n" for record in found))
        return found

    def append(self, label: str, record: Record) -> None:
        """Adds the record of one finished query to a row."""
        with self._path(label).open("a", encoding="utf-8") as file:
            file.write(record.line() + "\n")

    def finish(self, files: dict[str, str | bytes]) -> None:
        """Writes the finished files, results.json last. Removes the partial folder and what an older run left."""
        for path in (self.out / "runs").glob("*.trec"):
            if f"runs/{path.name}" not in files:
                path.unlink()
        for name in REPORTS:  # they belong to the results that are replaced
            (self.out / name).unlink(missing_ok=True)
        for name in sorted(files, key=lambda n: n == RESULTS):
            write_atomically(self.out / name, files[name])
        shutil.rmtree(self.partial, ignore_errors=True)

    def _path(self, label: str) -> Path:
        return self.partial / f"{file_name(label)}.jsonl"


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")  # noqa: TRY004
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); start again with --overwrite") from None
    return value


def _whole_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = Record.parse(line)
            except ValueError:
                return
            if not line.endswith("\n"):
                return
            yield record
