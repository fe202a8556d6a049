"""Reading and writing files: paths with ~, gzip, hidden files, atomic writes, and JSON as dataclasses. Imports nothing that is slow to load."""

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
Json = str | int | float | bool | None | list[Any] | Mapping[str, Any]
COMPRESSIONS = {
    rb"BZh[1-9]1AY&SY": "bzip2", rb"\xfd7zXZ\x00": "xz", rb"\x28\xb5\x2f\xfd": "zstd", rb"\x04\x22\x4d\x18": "lz4", rb"PK\x03\x04": "zip", rb"7z\xbc\xaf": "7-Zip",
}  # fmt: skip


def expanded(place: str) -> str:
    """Expands a leading ~ or ~user of a path, also after hf:, irds:, run: and splade:. Any other text is returned unchanged.

    A shell expands ~ only at the start of a word. TOML files and environment variables never have it expanded.

    Raises:
        UserError: there is no such user, or no home folder.
    """
    prefix, colon, rest = place.partition(":")
    prefix, rest = (f"{prefix}:", rest) if colon and prefix in ("hf", "irds", "run", "splade") else ("", place)
    if not rest.startswith("~"):
        return place
    try:
        return f"{prefix}{Path(rest).expanduser()}"
    except RuntimeError:
        raise UserError(f"{place}: {Path(rest).parts[0]} is no user's home folder here; write ./{rest} for a file of that name") from None


def hidden(name: str) -> bool:
    """Whether a file was left behind by an operating system or an editor: .name, .folder/name, __MACOSX/name.

    Args:
        name: the file's path inside a collection, with / as separator.
    """
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def decompressed(file: BufferedReader, label: str) -> BufferedReader:
    """A reader of an open file's content. Gzip is recognised by the first bytes and decompressed.

    Args:
        file: opened in binary mode, at its start.
        label: names the file in messages.

    Raises:
        UserError: the file is compressed by another program, or is text in UTF-16.
    """
    start = file.peek(10)[:10]
    if start.startswith(b"\x1f\x8b"):
        return cast(BufferedReader, gzip.GzipFile(fileobj=file))
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{label}: text in UTF-16, as PowerShell's > writes it; save it as UTF-8")
    for magic, name in COMPRESSIONS.items():
        if re.match(magic, start):
            raise UserError(f"{label}: packed with {name}, and of such gzip alone is read: unpack it")
    return file


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a file for reading in binary mode, and decompresses it if it is gzipped.

    Raises:
        UserError: the file does not exist, is compressed by another program, damaged, or cut off.
    """
    try:
        with path.open("rb") as file:
            yield decompressed(file, str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off, gzip cannot unpack it ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: the file cannot be read, or is a pipe, which can be read only once.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: no file but a pipe; write the run to a file first, which results then name by its hash")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


class DecodeError(ValueError):
    """JSON that does not fit a dataclass. The message names the place and the fault."""


def json_name(name: str, **options: Any) -> Any:
    """A dataclass field whose key in JSON differs from its name in Python."""
    return field(metadata={"name": name}, **options)


def encode(value: Any) -> Any:
    """A dataclass as values that json.dumps accepts. Fields made by `json_name` get their JSON keys."""
    if is_dataclass(value):
        return {f.metadata.get("name", f.name): encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(inner) for key, inner in value.items()}
    return [encode(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def read_versioned(path: Path, schema: int, remedy: str) -> Any:
    """Reads a JSON object that names its schema.

    Args:
        path: the file.
        schema: the one that this version reads.
        remedy: what to do if the file is damaged or older; ends the message.

    Raises:
        UserError: the file is damaged, or of another schema.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); {remedy}") from None
    found = value.get("schema") if isinstance(value, dict) else None
    if found != schema or type(found) is not int:
        newer = isinstance(found, int) and found > schema
        raise UserError(f"{path}: schema {found!r}, and this version reads schema {schema}; {'a newer rerank_lab made it: upgrade' if newer else remedy}")
    return value


def decode(kind: type[T], value: Any, place: str = "") -> T:
    """Makes a dataclass from parsed JSON.

    Args:
        kind: the dataclass. Its fields are dataclasses, lists, dict[str, …], numbers, strings, booleans, or one of these or None.
        value: the parsed JSON. Keys without a field are ignored.
        place: the value's path in its file, for messages.

    Raises:
        DecodeError: a field without a default is missing, or a value has the wrong type.
    """
    found: T = _decoded(kind, value, place)
    return found


def _decoded(kind: Any, value: Any, place: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if kind == Json or (value is None and type(None) in inner) or (isinstance(value, str) and str in inner):
            return value
        kind = next(one for one in inner if one is not type(None))
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) or origin is dict:
        if not isinstance(value, dict):
            raise DecodeError(f"{place or 'it'}{'.' if place and not place.endswith('.') else ''} is no object")
        place = f"{place.removesuffix('.')}." if place else ""
        if origin is dict:
            return {key: _decoded(inner[1], own, f"{place}{key}") for key, own in value.items()}
        hints, given = typing.get_type_hints(kind), {}
        for f in fields(kind):
            name = f.metadata.get("name", f.name)
            if name in value:
                given[f.name] = _decoded(hints[f.name], value[name], f"{place}{name}")
            elif f.default is MISSING and f.default_factory is MISSING:
                raise DecodeError(f"{place}{name} is missing")
        return kind(**given)
    if origin is list:
        if not isinstance(value, list):
            raise DecodeError(f"{place} is no list")
        return [_decoded(inner[0], one, f"{place}[{n}].") for n, one in enumerate(value)]
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise DecodeError(f"{place.removesuffix('.')} is {json.dumps(value)[:40]}")
    return value


def valid_text(text: str) -> bool:
    """Whether a string can be written as UTF-8. Half of a surrogate pair cannot; JSON can contain one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that readers see all of it or nothing: under a temporary name first, then renamed. Text is written as UTF-8.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
