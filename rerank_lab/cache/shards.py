"""Files that hold vectors: how a shard is written, recognised, read back and, where it is damaged, dropped.

A shard is a safetensors file that is written to a temporary name, renamed to one that ends in its checksum, and memory-mapped
when it is read.
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
SCHEMA = "2"
ABOUT = "about.json"
ABANDONED = 3600.0  # seconds after which a temporary file has no writer any more


def is_shard(name: str) -> bool:
    """Whether a file has a shard's name."""
    return re.fullmatch(r"[0-9a-f]{32}-[0-9a-f]{8}\.safetensors", name) is not None


def shards(folder: Path) -> list[tuple[tuple[int, str, int], Path]]:
    """A model's shards with their `age`, those that were used last at the end."""
    return sorted((age(path), path) for path in folder.glob("*.safetensors") if is_shard(path.name))


def abandoned(folder: Path) -> list[Path]:
    """Temporary files whose writer was stopped."""
    found = []
    for path in folder.glob("*.tmp"):
        with suppress(OSError):  # its writer may just be renaming it
            if re.fullmatch(r"[0-9a-f]{32}\.tmp", path.name) and time.time() - path.stat().st_mtime > ABANDONED:
                found.append(path)
    return found


def write(folder: Path, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> Path:
    """Writes the vectors of N texts; the shard's path.

    Raises:
        OSError, SafetensorError: it cannot be written; safetensors has its own for a full disk.
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
        save_file(tensors, temporary, {"schema": SCHEMA, "detail": str(int(detail))})
    except (OSError, SafetensorError):
        with suppress(OSError):
            temporary.unlink()
        raise
    path = folder / f"{stem.name}-{checksum(temporary):08x}.safetensors"
    os.replace(temporary, path)
    return path


def keys(path: Path) -> tuple[list[bytes], Detail] | None:
    """The keys of the texts whose vectors a shard holds, and in which detail; None where it is of another schema or damaged; unless a newer version wrote it, it is deleted then.

    Raises:
        OSError, RuntimeError: as `read`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("schema") == SCHEMA:
                found = file.get_tensor("keys")
                if found.dtype != torch.uint8 or found.ndim != 2 or found.shape[1] != 16:
                    raise ValueError(f"keys of shape {tuple(found.shape)}")
                return [row.tobytes() for row in found.numpy()], Detail(int(about["detail"]))
        if int(about.get("schema", 0)) < int(SCHEMA):
            log.info("vector cache: %s has an older form; deleted", path)
            path.unlink(missing_ok=True)
    except (KeyError, ValueError, SafetensorError):
        discard(path)
    return None


def keys_from(head: Callable[..., bytes], path: Path) -> tuple[list[bytes], Detail] | None:
    """`keys` of a shard that lies elsewhere, by parts: its header, then the keys alone.

    Args:
        head: size and start → so many bytes of the file from there on.
        path: what messages call it.
    """
    try:
        size = int.from_bytes(head(8), "little")
        header = json.loads(head(size, 8))
        about, entry = header["__metadata__"], header["keys"]
        if about["schema"] != SCHEMA or entry["dtype"] != "U8" or entry["shape"][1] != 16:
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
    """A shard's vectors, mapped; None where it does not read back, and is deleted then.

    Args:
        path: of the shard.
        check: whether its checksum is to be made, for which all of it is read.

    Raises:
        OSError, RuntimeError: it is gone, or cannot be opened or mapped; torch has the second for both.
    """
    try:
        if not check or f"{checksum(path):08x}" == path.stem.rpartition("-")[2]:
            tensors = load_file(path)
            return Vectors(**{field.name: tensors[field.name] for field in fields(Vectors)})
    except (KeyError, SafetensorError):
        pass
    discard(path)
    return None


def leave(path: Path, error: Exception) -> None:
    """Says why a shard that is not damaged cannot be used; nothing of one that another process has just dropped."""
    if path.exists():
        log.warning("vector cache: %s cannot be read (%s); left alone, its texts will be encoded again", path, str(error).partition("\n")[0])


def discard(path: Path) -> None:
    """Deletes a damaged shard, with a warning; one that another process has just dropped is no damage."""
    if path.exists():
        log.warning("vector cache: %s does not read back; deleted, its texts will be encoded again", path)
        with suppress(OSError):
            path.unlink()


def age(path: Path) -> tuple[int, str, int]:
    """Last use, name and bytes of a file; one that is gone meanwhile was used never."""
    try:
        found = path.stat()
        return found.st_mtime_ns, path.name, found.st_size
    except OSError:
        return 0, path.name, 0


def checksum(path: Path) -> int:
    """Of the file as it is read, not mapped: what is only checked must not count as the process's memory."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
