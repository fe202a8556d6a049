"""Vectors that are made once: a cache by (model, token limit, text), in memory and, where a folder is given, on disk.

On disk a model's vectors are shards, one safetensors file for each call of `add`, written to a temporary name and
renamed to one that ends in its checksum, memory-mapped when read. A shard that does not read back (cut short, wrong
checksum) is deleted with a warning and its texts are encoded again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rerank_lab.models.bi_encoder import BiEncoder, Vectors

log = logging.getLogger(__name__)
SCHEMA = "1"
CHUNK = 512
MEMORY_BYTES = 2 << 30

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
    has_tokens: bool
    in_memory: int  # bytes held by the process; 0 for a memory-mapped file


class VectorCache:
    """Vectors of one model.

    Args:
        model_key: what the vectors depend on besides text and token limit (BiEncoder.key).
        folder: where shards are kept; None: in memory alone.
        memory_bytes: bound on what is held in memory without a folder; the oldest shards go first.
    """

    def __init__(self, model_key: str, folder: Path | None = None, memory_bytes: int = MEMORY_BYTES):
        self.folder = None if folder is None else folder / "vectors" / model_key
        self.memory_bytes = memory_bytes
        self._shards: dict[int, Shard] = {}
        self._places: dict[bytes, tuple[int, int]] = {}
        self._next, self._dropped = 0, False
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.glob("*.tmp"):
                with suppress(OSError):  # its writer may just be renaming it
                    if time.time() - path.stat().st_mtime > 3600:
                        path.unlink()
            for path in sorted(self.folder.glob("*.safetensors")):
                shard = _read(path)
                if shard is None:
                    log.warning("vector cache: %s does not read back; deleted, its texts will be encoded again", path)
                    with suppress(OSError):
                        path.unlink()
                else:
                    self._register(shard)

    def __len__(self) -> int:
        return len(self._places)

    def has(self, key: bytes, tokens: bool) -> bool:
        """Whether the text's vectors are here, token vectors included where they are asked for."""
        place = self._places.get(key)
        return place is not None and (self._shards[place[0]].has_tokens or not tokens)

    def add(self, keys: Sequence[bytes], vectors: Vectors, tokens: bool) -> None:
        """Keeps the vectors of N texts; on disk first, where there is a folder."""
        if self.folder is None:
            size = sum(t.numel() * t.element_size() for t in (vectors.pooled, vectors.tokens))
            self._register(Shard(list(keys), vectors, tokens, size))
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shard = _read(_write(self.folder, keys, vectors, tokens))
        except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
            log.warning("vector cache: %s cannot be written (%s); going on without it", self.folder, error)
            self.folder = None
            self.add(keys, vectors, tokens)
            return
        if shard is not None:
            self._register(shard)

    def gather(self, keys: Sequence[bytes], tokens: bool) -> Vectors:
        """The vectors of N texts that are all here, in that order."""
        rows = [(self._shards[s].vectors, row) for s, row in (self._places[key] for key in keys)]
        pooled = torch.stack([v.pooled[row] for v, row in rows]) if rows else torch.zeros(0, 0)
        lengths = torch.tensor([int(v.lengths[row]) for v, row in rows], dtype=torch.int64)
        if not tokens or not rows:
            return Vectors(pooled, lengths, torch.zeros(len(rows) + 1, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.float16))
        parts = [v.tokens[int(v.offsets[row]) : int(v.offsets[row + 1])] for v, row in rows]
        counts = torch.tensor([0, *(len(part) for part in parts)], dtype=torch.int64)
        return Vectors(pooled, lengths, counts.cumsum(0), torch.cat(parts))

    def _register(self, shard: Shard) -> None:
        self._shards[self._next] = shard
        for row, key in enumerate(shard.keys):
            if shard.has_tokens or not self.has(key, True):
                self._places[key] = (self._next, row)
        self._next += 1

    def trim(self) -> None:
        """Drops the oldest shards in memory past the bound; called when nothing is about to be gathered."""
        total = sum(shard.in_memory for shard in self._shards.values())
        for number in [n for n, shard in self._shards.items() if shard.in_memory]:
            if total <= self.memory_bytes:
                return
            shard = self._shards.pop(number)
            if not self._dropped:
                log.warning("vector cache: more than %.1f GB of vectors in memory; the oldest are dropped and made again when needed", self.memory_bytes / 1e9)
            self._dropped = True
            total -= shard.in_memory
            for key in shard.keys:
                if self._places.get(key, (-1, 0))[0] == number:
                    del self._places[key]


def ensure(
    encoder: BiEncoder,
    cache: VectorCache,
    texts: Sequence[str],
    *,
    max_tokens: int,
    tokens: bool,
    kind: str = "document",
    progress: Progress = lambda done, total: None,
) -> list[bytes]:
    """Encodes those of N texts that the cache lacks, each distinct one once, and gives every text's key.

    Args:
        encoder, cache: of the same model.
        texts: any strings, repeated ones too.
        max_tokens: own tokens kept of each text.
        tokens: whether token vectors are wanted.
        kind: "document" or "query", which chooses the model's prompt.
        progress: called as texts are encoded, with how many just were and how many are to be; what was encoded before an
            interruption stays in the folder.
    """
    keys = [text_key(text, max_tokens, kind) for text in texts]
    missing = {key: text for key, text in zip(keys, texts) if not cache.has(key, tokens)}
    new = list(missing)
    for start in range(0, len(new), CHUNK):
        chunk = new[start : start + CHUNK]
        vectors = encoder.encode([missing[k] for k in chunk], kind=kind, max_tokens=max_tokens, tokens=tokens, progress=lambda done: progress(done, len(new)))
        cache.add(chunk, vectors, tokens)
    return keys


def _write(folder: Path, keys: Sequence[bytes], vectors: Vectors, tokens: bool) -> Path:
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), 16),
        "pooled": vectors.pooled.contiguous(),
        "lengths": vectors.lengths,
        "offsets": vectors.offsets,
        "tokens": vectors.tokens.contiguous(),
    }
    stem = folder / uuid.uuid4().hex
    temporary = stem.with_suffix(".tmp")
    save_file(tensors, temporary, {"schema": SCHEMA, "tokens": str(int(tokens))})
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
        vectors = Vectors(tensors["pooled"], tensors["lengths"], tensors["offsets"], tensors["tokens"])
        return Shard(keys, vectors, about["tokens"] == "1", 0)
    except (OSError, KeyError, ValueError, SafetensorError):
        return None


def _checksum(path: Path) -> int:
    """Of the file as it is read, not mapped: what is only checked must not count as the process's memory."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
