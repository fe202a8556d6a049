"""Files as people name, pack and leave them: ~, gzip, and what lies hidden beside them."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import cast

from rerank_lab.errors import UserError

PACKERS = {
    rb"BZh[1-9]1AY&SY": "bzip2", rb"\xfd7zXZ\x00": "xz", rb"\x28\xb5\x2f\xfd": "zstd", rb"\x04\x22\x4d\x18": "lz4", rb"PK\x03\x04": "zip", rb"7z\xbc\xaf": "7-Zip",
}  # fmt: skip


def expanded(place: str) -> str:
    """The place with a leading ~ or ~user put in full, behind hf:, irds: and run: too; any other place as it is.

    Shells do so at the start of a word alone, and neither do TOML files nor the environment.

    Raises:
        UserError: no such user, or no home folder.
    """
    prefix, colon, rest = place.partition(":")
    prefix, rest = (f"{prefix}:", rest) if colon and prefix in ("hf", "irds", "run") else ("", place)
    if not rest.startswith("~"):
        return place
    try:
        return f"{prefix}{Path(rest).expanduser()}"
    except RuntimeError:
        raise UserError(f"{place}: {Path(rest).parts[0]} is no user's home folder here; write ./{rest} for a file of that name") from None


def hidden(name: str) -> bool:
    """Whether a file, by its path inside a collection with /, is one of those that systems and editors leave: .name, .folder/name, __MACOSX/name."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def unpacked(file: BufferedReader, label: str) -> BufferedReader:
    """What reads the content of an open file: gzip's, which its first bytes tell, is taken off.

    Raises:
        UserError: packed by another program.
    """
    start = file.peek(10)[:10]
    if start.startswith(b"\x1f\x8b"):
        return cast(BufferedReader, gzip.GzipFile(fileobj=file))
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{label}: text in UTF-16, as PowerShell's > writes it; save it as UTF-8")
    for magic, name in PACKERS.items():
        if re.match(magic, start):
            raise UserError(f"{label}: packed with {name}, and of such gzip alone is read: unpack it")
    return file


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A file's content, unpacked where gzip packed it.

    Raises:
        UserError: no such file, packed by another program, damaged, or cut off.
    """
    try:
        with path.open("rb") as file:
            yield unpacked(file, str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off, gzip cannot unpack it ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it cannot be read, or not twice: a pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: no file but a pipe; write the run to a file first, which results then name by its hash")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
