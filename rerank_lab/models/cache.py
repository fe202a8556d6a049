"""Vectors that are made once: a cache by (model, token limit, text), in memory and, where a folder is given, on disk.

On disk a model's vectors are shards, one safetensors file for each call of `add`, written to a temporary name and
renamed to one that ends in its checksum, memory-mapped when read. A shard that does not read back (cut short, wrong
checksum) is deleted with a warning and its texts are encoded again. Past a bound in bytes the oldest shards are dropped.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rerank_lab.models.bi_encoder import BiEncoder, Detail, Vectors

log = logging.getLogger(__name__)
SCHEMA = "2"
CHUNK = {Detail.POOLED: 512, Detail.TOKENS: 512, Detail.STATES: 64}  # texts a shard, tens of megabytes at most
MEMORY_BYTES = 2 << 30
DISK_BYTES = 16 << 30

Progress = Callable[[int, int], object]


def default_folder() -> Path:
    """RERANK_LAB_CACHE, else rerank_lab in the user's cache folder."""
    if folder := os.environ.get("RERANK_LAB_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rerank_lab"


def text_key(text: str, max_tokens: int, kind: str = "document") -> bytes:
    """16 bytes that stand for a text at a token limit, as a document or as a query."""
    return hashlib.blake2b(f"{kind}\0{max_tokens}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Shard:
    keys: list[bytes]
    vectors: Vectors
    detail: Detail
    path: Path | None = None  # None: held by the process

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.vectors.pooled, self.vectors.tokens, self.vectors.states))


class VectorCache:
    """Vectors of one model.

    Args:
        model_key: what the vectors depend on besides text and token limit (BiEncoder.key).
        folder: where shards are kept; None: in memory alone.
        memory_bytes: bound on what is held in memory without a folder; the oldest shards go first.
        disk_bytes: bound on what the folder holds of this model; the same.
    """

    def __init__(self, model_key: str, folder: Path | None = None, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES):
        self.folder = None if folder is None else folder / "vectors" / model_key
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self._lock = threading.RLock()  # of what is written; a reader's own texts are in its way only where it borrowed them
        self._shards: dict[int, Shard] = {}
        self._places: dict[bytes, tuple[int, int]] = {}
        self._next, self._dropped = 0, False
        self._bytes = {True: 0, False: 0}  # held in memory, on disk
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.glob("*.tmp"):
                with suppress(OSError):  # its writer may just be renaming it
                    if time.time() - path.stat().st_mtime > 3600:
                        path.unlink()
            for path in sorted(self.folder.glob("*.safetensors"), key=_age):
                shard = _read(path)
                if shard is None and not path.exists():
                    continue  # another process has just dropped it
                if shard is None:
                    log.warning("vector cache: %s does not read back; deleted, its texts will be encoded again", path)
                    with suppress(OSError):
                        path.unlink()
                else:
                    self._register(shard)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def held_bytes(self) -> int:
        """Vectors in memory."""
        return self._bytes[True]

    def has(self, key: bytes, detail: Detail) -> bool:
        """Whether the text's vectors are here, in at least this detail."""
        place = self._places.get(key)
        return place is not None and self._shards[place[0]].detail >= detail

    def add(self, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> None:
        """Keeps the vectors of N texts; on disk first, where there is a folder."""
        if self.folder is None:
            self._register(Shard(list(keys), vectors, detail))
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shard = _read(_write(self.folder, keys, vectors, detail))
        except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
            log.warning("vector cache: %s cannot be written (%s); going on without it", self.folder, error)
            self.folder = None
            self.add(keys, vectors, detail)
            return
        self._register(shard or Shard(list(keys), vectors, detail))  # another process may have dropped the file already

    def gather(self, keys: Sequence[bytes], detail: Detail) -> Vectors:
        """The vectors of N texts that are all here, in that order; `detail` and no more, states left to `states`."""
        rows = [(self._shards[s].vectors, row) for s, row in (self._places[key] for key in keys)]
        pooled = torch.stack([v.pooled[row] for v, row in rows]) if rows else torch.zeros(0, 0)
        lengths = torch.tensor([int(v.lengths[row]) for v, row in rows], dtype=torch.int64)
        nothing = torch.zeros(0, 0, dtype=torch.float16)
        if not detail or not rows:
            return Vectors(pooled, lengths, torch.zeros(len(rows) + 1, dtype=torch.int64), nothing, nothing)
        spans = [(v, int(v.offsets[row]), int(v.offsets[row + 1])) for v, row in rows]
        counts = torch.tensor([0, *(end - start for _, start, end in spans)], dtype=torch.int64)
        tokens = torch.cat([v.tokens[start:end] for v, start, end in spans])
        return Vectors(pooled, lengths, counts.cumsum(0), tokens, nothing)

    def states(self, keys: Sequence[bytes]) -> list[Tensor]:
        """The states of N texts that are all here in that detail, one tensor each: views, since to copy them costs as much as to read them."""
        places = [(self._shards[s].vectors, row) for s, row in (self._places[key] for key in keys)]
        return [v.states[int(v.offsets[row]) : int(v.offsets[row + 1])] for v, row in places]

    def borrow(self, other: VectorCache, keys: Sequence[bytes], detail: Detail) -> list[bytes]:
        """Shares what another cache holds of these texts, so that it stays here when it is dropped there.

        Returns:
            the keys that neither holds in this detail.
        """
        lacking = []
        with other._lock:
            for key in keys:
                if other.has(key, detail):
                    number, row = other._places[key]
                    shard = other._shards[number]
                    self._shards[id(shard)] = shard
                    self._places[key] = (id(shard), row)
                elif not self.has(key, detail):
                    lacking.append(key)
        return lacking

    def _register(self, shard: Shard) -> None:
        with self._lock:
            self._shards[self._next] = shard
            for row, key in enumerate(shard.keys):
                place = self._places.get(key)
                if place is None or self._shards[place[0]].detail <= shard.detail:
                    self._places[key] = (self._next, row)
            self._next += 1
            self._bytes[shard.path is None] += shard.bytes

    def trim(self) -> None:
        """Drops the oldest shards past the bounds; called when nothing is about to be gathered."""
        with self._lock:
            self._trim()

    def _trim(self) -> None:
        for held, bound in ((False, self.disk_bytes), (True, self.memory_bytes)):
            if self._bytes[held] <= bound:
                continue
            if not self._dropped:
                where = "in memory (a folder holds more)" if held else f"in {self.folder} (--cache-gb, cache_bytes)"
                log.warning(
                    "vector cache: more than %.1f GB of vectors %s; the oldest are dropped, and timed again where they are made again", bound / 1e9, where
                )
            self._dropped = True
            for number in [n for n, shard in self._shards.items() if (shard.path is None) == held]:
                self._drop(number)
                if self._bytes[held] <= bound:
                    break

    def _drop(self, number: int) -> None:
        shard = self._shards.pop(number)
        self._bytes[shard.path is None] -= shard.bytes
        for key in shard.keys:
            if self._places.get(key, (-1, 0))[0] == number:
                del self._places[key]
        if shard.path is not None:
            with suppress(OSError):  # another process may have dropped it
                shard.path.unlink()


def ensure(
    encoder: BiEncoder,
    cache: VectorCache,
    texts: Sequence[str],
    *,
    max_tokens: int,
    detail: Detail,
    kind: str = "document",
    progress: Progress = lambda done, total: None,
    keep: bool = True,
) -> list[bytes]:
    """Encodes those of N texts that the cache lacks, each distinct one once, and gives every text's key.

    Args:
        encoder, cache: of the same model.
        texts: any strings, repeated ones too.
        max_tokens: own tokens kept of each text.
        detail: what is wanted of each.
        kind: "document" or "query", which chooses the model's prompt.
        progress: called as texts are encoded, with how many just were and how many are to be; what was encoded before an
            interruption stays in the folder.
        keep: False where nothing is gathered next, so that the cache may be kept to its bounds meanwhile.
    """
    keys = [text_key(text, min(max_tokens, encoder.limit), kind) for text in texts]
    missing = {key: text for key, text in zip(keys, texts) if not cache.has(key, detail)}
    new = list(missing)
    for start in range(0, len(new), CHUNK[detail]):
        chunk = new[start : start + CHUNK[detail]]
        vectors = encoder.encode([missing[k] for k in chunk], kind=kind, max_tokens=max_tokens, detail=detail, progress=lambda done: progress(done, len(new)))
        cache.add(chunk, vectors, detail)
        if not keep:
            cache.trim()
    return keys


def _write(folder: Path, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> Path:
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
    save_file(tensors, temporary, {"schema": SCHEMA, "detail": str(int(detail))})
    path = folder / f"{stem.name}-{_checksum(temporary):08x}.safetensors"
    os.replace(temporary, path)
    return path


def _read(path: Path) -> Shard | None:
    try:
        if f"{_checksum(path):08x}" != path.stem.rpartition("-")[2]:
            return None
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        tensors = load_file(path)
        if about["schema"] != SCHEMA:
            return None
        keys = [bytes(row) for row in tensors["keys"].numpy()]
        vectors = Vectors(**{field.name: tensors[field.name] for field in fields(Vectors)})
        return Shard(keys, vectors, Detail(int(about["detail"])), path)
    except (OSError, KeyError, ValueError, SafetensorError):
        return None


def _age(path: Path) -> tuple[int, str]:
    """Sorts the oldest first; a file that is gone meanwhile goes first."""
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


def _checksum(path: Path) -> int:
    """Of the file as it is read, not mapped: what is only checked must not count as the process's memory."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
