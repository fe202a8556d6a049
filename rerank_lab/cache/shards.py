"""Shards, the files that hold vectors: writing, recognising, reading, and deleting damaged ones.

A shard is a safetensors file. It is written under a temporary name, renamed to a name that ends in its checksum, and
memory-mapped for reading.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rerank_lab.models.base import Detail, Vectors

log = logging.getLogger(__name__)
SHARD_SCHEMA = "2"
ABOUT = "about.json"
SPREADS = "spread-*.json"  # how far a model's token similarities spread (methods/spread.py), a file for each query prompt
ABANDONED = 3600.0  # seconds after which a temporary file is taken to be abandoned


def is_shard(name: str) -> bool:
    """Whether this is the name of a shard."""
    return re.fullmatch(r"[0-9a-f]{32}-[0-9a-f]{8}\.safetensors", name) is not None


def shards(folder: Path) -> list[tuple[tuple[int, str, int], Path]]:
    """The shards in a folder with their `last_use`, the most recently used last."""
    return sorted((last_use(path), path) for path in folder.glob("*.safetensors") if is_shard(path.name))


def abandoned(folder: Path) -> list[Path]:
    """Temporary files in a folder whose writer was stopped."""
    found = []
    for path in folder.glob("*.tmp"):
        with suppress(OSError):  # its writer may be renaming it
            if re.fullmatch(r"[0-9a-f]{32}\.tmp", path.name) and time.time() - path.stat().st_mtime > ABANDONED:
                found.append(path)
    return found


def write(folder: Path, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> Path:
    """Writes the vectors of N texts as a shard and returns its path.

    Args:
        folder: where the shard goes.
        keys: N keys, 16 bytes each.
        vectors: of the N texts.
        detail: of the vectors.

    Raises:
        OSError, SafetensorError: the shard cannot be written. safetensors raises its own error for a full disk.
    """
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), 16),
        "pooled": vectors.pooled.contiguous(),
        "lengths": vectors.lengths,
        "offsets": vectors.offsets,
        "tokens": vectors.tokens.contiguous(),
        "states": vectors.states.contiguous(),
    }
    stem = folder / uuid.uuid4().hex
    temporary = stem.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, {"schema": SHARD_SCHEMA, "detail": str(int(detail))})
    except (OSError, SafetensorError):
        with suppress(OSError):
            temporary.unlink()
        raise
    path = folder / f"{stem.name}-{checksum(temporary):08x}.safetensors"
    os.replace(temporary, path)
    return path


def keys(path: Path) -> tuple[list[bytes], Detail] | None:
    """The keys of a shard's texts, and the detail of their vectors.

    Returns:
        None if the shard is damaged or of another schema. It is then deleted, unless its schema is newer than this version's.

    Raises:
        OSError, RuntimeError: as `read`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("schema") == SHARD_SCHEMA:
                found = file.get_tensor("keys")
                if found.dtype != torch.uint8 or found.ndim != 2 or found.shape[1] != 16:
                    raise ValueError(f"keys of shape {tuple(found.shape)}")
                return [row.tobytes() for row in found.numpy()], Detail(int(about["detail"]))
        if int(about.get("schema", 0)) < int(SHARD_SCHEMA):
            log.info("vector cache: %s has an older form; deleted", path)
            path.unlink(missing_ok=True)
    except (KeyError, ValueError, SafetensorError):
        discard(path)
    return None


def keys_from(head: Callable[..., bytes], path: Path) -> tuple[list[bytes], Detail] | None:
    """`keys` of a shard on another machine. Only its header and the keys are fetched, and the shard is never deleted.

    Args:
        head: size and start → that many bytes of the file from there on.
        path: names the shard in messages.
    """
    try:
        size = int.from_bytes(head(8), "little")
        header = json.loads(head(size, 8))
        about, entry = header["__metadata__"], header["keys"]
        if about["schema"] != SHARD_SCHEMA or entry["dtype"] != "U8" or entry["shape"][1] != 16:
            raise ValueError(f"schema {about['schema']}, keys of shape {entry['shape']}")
        start, end = entry["data_offsets"]
        packed = head(end - start, 8 + size + start)
        if len(packed) != 16 * entry["shape"][0]:
            raise ValueError("cut short")
        return [packed[i : i + 16] for i in range(0, len(packed), 16)], Detail(int(about["detail"]))
    except (KeyError, ValueError, TypeError) as error:
        log.warning("vector cache: %s does not read back (%s); left alone, its texts will be encoded again", path.name, error)
        return None


def read(path: Path, check: bool = True) -> Vectors | None:
    """A shard's vectors, memory-mapped; None if it is damaged. It is then deleted.

    Args:
        path: of the shard.
        check: whether to verify its checksum, for which the whole file is read.

    Raises:
        OSError, RuntimeError: the shard is gone, or cannot be opened or mapped. torch raises RuntimeError.
    """
    try:
        if not check or f"{checksum(path):08x}" == path.stem.rpartition("-")[2]:
            tensors = load_file(path)
            return Vectors(**{field.name: tensors[field.name] for field in fields(Vectors)})
    except (KeyError, SafetensorError):
        pass
    discard(path)
    return None


def warn_unreadable(path: Path, error: Exception) -> None:
    """Warns that a shard cannot be read, although it may not be damaged. Silent if another process has deleted it."""
    if path.exists():
        log.warning("vector cache: %s cannot be read (%s); left alone, its texts will be encoded again", path, str(error).partition("\n")[0])


def discard(path: Path) -> None:
    """Deletes a damaged shard, with a warning. Silent if another process has deleted it already."""
    if path.exists():
        log.warning("vector cache: %s does not read back; deleted, its texts will be encoded again", path)
        with suppress(OSError):
            path.unlink()


def last_use(path: Path) -> tuple[int, str, int]:
    """Last use (nanoseconds since 1970), name and bytes of a file. Last use is 0 if the file is gone."""
    try:
        found = path.stat()
        return found.st_mtime_ns, path.name, found.st_size
    except OSError:
        return 0, path.name, 0


def checksum(path: Path) -> int:
    """CRC-32 of a file. The file is read, not mapped, so that checking does not count towards the process's peak memory."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
