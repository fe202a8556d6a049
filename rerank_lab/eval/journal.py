"""What an evaluation has done so far, kept so that it survives Ctrl-C and kill -9.

In OUT/partial: config.json, and for each method a file with one line a finished query.
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
from rerank_lab.eval.results import AGAIN, SCHEMA, Results, parse
from rerank_lab.files import DecodeError, Json, write_atomically

RESULTS = "results.json"
REPORTS = ("report.md", "report.html", "report.tex")


def file_name(label: str) -> str:
    """A method's label as a file name: best:tau=0.05 → best-tau=0.05.

    An address is shortened and gets a hash of the label, since http://a:80:best and http://a/80:best would be one name.
    """
    name = re.sub(r"[^\w.+=-]+", "-", label)
    return f"{name[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}" if "/" in label else name


class Journal:
    """The folder of one evaluation while it runs.

    Args:
        out: the results folder.
        resume, overwrite: what to do with what is there.

    Raises:
        UserError: the folder holds results or an interrupted run and neither flag was given.
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
            if new:  # wrong input, found later, leaves no empty folder
                out.rmdir()
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
        # While a run goes on over old results, both are there; the partial folder goes last.
        done = (out / RESULTS).is_file() and not self.partial.is_dir()
        self.finished = done and not overwrite
        if not (overwrite or resume) and (done or self.partial.is_dir()):
            state = "holds results" if done else "holds an interrupted run"
            raise UserError(f"{out} {state}: --resume to go on, --overwrite to replace, or another --out")

    def results(self, config: Mapping[str, Json]) -> Results:
        """The finished results, if this configuration made them.

        Raises:
            UserError: they do not read back, or another version or configuration made them.
        """
        value = _load(self.out / RESULTS)
        if value.get("schema") != SCHEMA:
            raise UserError(f"{self.out}: results of schema {value.get('schema')}, and this version's is {SCHEMA}; start again with --overwrite")
        self._compare(value.get("config", {}), config, "the finished run")
        try:
            return parse(value)
        except DecodeError as problem:
            raise UserError(f"{self.out / RESULTS}: {problem}; {AGAIN}") from None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Fixes what the run depends on, or checks it against the interrupted one's; all input has proved sound by now.

        Raises:
            UserError: the interrupted run had another configuration, collection, model or candidates; each is named.
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
        """Finished queries of a method; a line cut short by a kill ends the list and is removed."""
        path = self._path(label)
        if not path.is_file():
            return []
        found = list(_whole_lines(path))
        write_atomically(path, "".join(record.line() + "\n" for record in found))
        return found

    def append(self, label: str, record: Record) -> None:
        """Adds one finished query."""
        with self._path(label).open("a", encoding="utf-8") as file:
            file.write(record.line() + "\n")

    def finish(self, files: dict[str, str | bytes]) -> None:
        """Puts the finished files in place, results.json last, and removes what was partial or from an older run."""
        for path in (self.out / "runs").glob("*.trec"):
            if f"runs/{path.name}" not in files:
                path.unlink()
        for name in REPORTS:  # of the results that these replace
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
