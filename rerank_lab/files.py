"""Files as people name, pack and leave them: ~, gzip, what lies hidden beside them; and JSON as dataclasses. Imports nothing that is slow to load."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import types
import typing
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, is_dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from rerank_lab.errors import UserError

T = TypeVar("T")
Json = str | int | float | bool | None | list[Any] | Mapping[str, Any]  # any value, as JSON has it
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


class Misfit(ValueError):
    """What a file lacks, or has of another kind: the place and the fault."""


def named(name: str, **options: Any) -> Any:
    """A field that stands in the file under a name which Python does not allow, or which another word says better."""
    return field(metadata={"name": name}, **options)


def encode(value: Any) -> Any:
    """A dataclass as JSON has it, under the names of the file."""
    if is_dataclass(value):
        return {f.metadata.get("name", f.name): encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(inner) for key, inner in value.items()}
    return [encode(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def decode(kind: type[T], value: Any, place: str = "") -> T:
    """JSON as a dataclass.

    Args:
        kind: a dataclass whose fields are dataclasses, lists, dict[str, …], numbers, strings, booleans, or one of these or None.
        value: the JSON; keys that no field has are left out.
        place: where it stands, for messages.

    Raises:
        Misfit: a field without a default is missing, or something is of another kind.
    """
    found: T = _decoded(kind, value, place)
    return found


def _decoded(kind: Any, value: Any, place: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if kind == Json or (value is None and type(None) in inner):
            return value
        kind = next(one for one in inner if one is not type(None))
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) or origin is dict:
        if not isinstance(value, dict):
            raise Misfit(f"{place or 'it'}{'.' if place and not place.endswith('.') else ''} is no object")
        place = f"{place.removesuffix('.')}." if place else ""
        if origin is dict:
            return {key: _decoded(inner[1], own, f"{place}{key}") for key, own in value.items()}
        hints, given = typing.get_type_hints(kind), {}
        for f in fields(kind):
            name = f.metadata.get("name", f.name)
            if name in value:
                given[f.name] = _decoded(hints[f.name], value[name], f"{place}{name}")
            elif f.default is MISSING and f.default_factory is MISSING:
                raise Misfit(f"{place}{name} is missing")
        return kind(**given)
    if origin is list:
        if not isinstance(value, list):
            raise Misfit(f"{place} is no list")
        return [_decoded(inner[0], one, f"{place}[{n}].") for n, one in enumerate(value)]
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise Misfit(f"{place.removesuffix('.')} is {json.dumps(value)[:40]}")
    return value


def valid_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; half of a surrogate pair, which JSON can smuggle in, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes under a temporary name of its own and renames it, so that the file is whole or not there; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
