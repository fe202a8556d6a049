"""python -m rerank_lab.cache info|clear: what the cache holds, and room."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rerank_lab import cli
from rerank_lab.cache.places import BESIDE, VECTORS, default_place
from rerank_lab.cli import non_negative, place_of
from rerank_lab.errors import UserError

EPILOG = """\
examples:
  python -m rerank_lab.cache info
      each model's vectors: bytes, files, last use
  python -m rerank_lab.cache clear --older-than 30
      what nobody has used for 30 days
  python -m rerank_lab.cache clear --model 3f2a
      one model's, by the first characters of its key

Nothing is lost that a run would not make again.
exit codes: 0 done, 1 something could not be deleted, 2 wrong input
"""


@dataclass(frozen=True)
class CacheFolder:
    """A folder in the cache: one model's vectors, or one of the folders beside them (places.BESIDE).

    Attributes:
        key: the folder's name; of vectors, the model's key.
        place: the folder.
        about: a description for people: of vectors, the model and its arithmetic, if known.
        files: path, bytes and last use (seconds since 1970) of each file.
    """

    key: str
    place: Path
    about: str
    files: list[tuple[Path, int, float]]

    @property
    def size(self) -> int:
        return sum(size for _, size, _ in self.files)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m rerank_lab.cache", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("info", "clear"))
    p.add_argument("--cache", type=place_of, metavar="DIR", help="the folder (default: $RERANK_LAB_CACHE or ~/.cache/rerank_lab)")
    p.add_argument("--model", metavar="KEY", help="only the model whose key begins so")
    p.add_argument("--older-than", type=non_negative, default=0.0, metavar="DAYS", help="clear: only what was not used for so long (default: everything)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parser().parse_args(argv)
    try:
        from rerank_lab.cache.store import Store, is_url

        place = options.cache or default_place()
        if is_url(place):
            raise UserError(f"--cache {Store(place).shown}: shows and clears folders; for this one use the tools of its file system")
        folder = Store(place).folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--cache {folder}: a file, not a folder")
        found = contents(folder)
        if options.model is not None:
            found = [held for held in found if held.key.startswith(options.model)]
            if not found:
                raise UserError(f"--model {options.model}: no such key in {folder}; info lists those that are there")
        return info(folder, found) if options.action == "info" else clear(folder, found, options.older_than)
    except UserError as error:
        print(f"rerank_lab: error: {error}", file=sys.stderr)
        return 2


def contents(folder: Path) -> list[CacheFolder]:
    """The folders in a cache, the largest first. Files that disappear meanwhile are left out."""
    from rerank_lab.cache.shards import ABOUT, SPREADS, abandoned, shards

    found = []
    for place in sorted((folder / VECTORS).glob("*/")):
        files = []
        for path in (*(path for _, path in shards(place)), *place.glob(SPREADS), *abandoned(place)):
            with suppress(OSError):
                files.append((path, path.stat().st_size, path.stat().st_mtime))
        try:
            about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
            label = f"{about['model']} ({about['arithmetic']}, {about['token_dimensions']} dimensions a token)"
        except (OSError, ValueError, KeyError, TypeError):
            label = "unknown model"
        found.append(CacheFolder(place.name, place, label, files))
    for name, label in BESIDE.items():
        if own := [(path, path.stat().st_size, path.stat().st_mtime) for path in (folder / name).glob("*") if path.is_file()]:
            found.append(CacheFolder(name, folder / name, label, own))
    return sorted(found, key=lambda held: -held.size)


def info(folder: Path, found: Sequence[CacheFolder]) -> int:
    """Prints the folders of a cache, in 80 columns. Returns the exit code."""
    for held in found:
        last = f"last used {_ago(max(used for _, _, used in held.files))}" if held.files else "empty"
        count = f"{len(held.files):,} file{'' if len(held.files) == 1 else 's'}"
        print(f"{held.key}  {_bytes(held.size):>9}  {count}, {last}\n  {held.about}")
    free = next((shutil.disk_usage(place).free for place in (folder, *folder.resolve().parents) if place.is_dir()), 0)
    print(f"{folder}: {_bytes(sum(held.size for held in found))} in all, {_bytes(free)} free on the disk")
    return 0


def clear(folder: Path, found: Sequence[CacheFolder], days: float) -> int:
    """Deletes files that were not used for `days` days, and folders that are empty then. Prints what it freed. Returns the exit code."""
    from rerank_lab.cache.shards import ABOUT

    freed, count, failed = 0, 0, []
    for held in found:
        for path, size, used in held.files:
            if time.time() - used >= days * 86400:
                try:
                    path.unlink(missing_ok=True)
                    freed, count = freed + size, count + 1
                except OSError as error:
                    failed.append(f"{path}: {error.strerror}")
        if [path.name for path in held.place.glob("*")] in ([], [ABOUT]):
            with suppress(OSError):  # another process may be writing there
                (held.place / ABOUT).unlink(missing_ok=True)
                held.place.rmdir()
    print(f"{folder}: {_bytes(freed)} in {count:,} file{'' if count == 1 else 's'} deleted" if count else f"{folder}: nothing to delete")
    for line in failed:
        print(f"rerank_lab: {line}", file=sys.stderr)
    return 1 if failed else 0


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


if __name__ == "__main__":
    sys.exit(cli.run(main))
