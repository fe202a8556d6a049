"""A cache of vectors by (model, token limit, text): in memory, or on disk if a folder is given.

On disk, a model's vectors are shards: one file for each call of `add` (shards.py), in a folder or behind a URL (store.py).
Opening a cache reads only the keys of the shards. A shard is checked when its vectors are first needed. If it is damaged
(cut short, wrong checksum), it is deleted with a warning, and its texts are encoded again.

If a folder exceeds its bound in bytes, the least recently used shards are deleted, no matter which process wrote or used
them. A file's modification time is its last use, to the minute. After one process has deleted a file, another process that
has mapped it can still read it, until it trims its own cache. Files behind a URL are never deleted; the bound then applies
to their local copies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from rerank_lab.cache import shards
from rerank_lab.cache.places import VECTORS
from rerank_lab.cache.store import Store
from rerank_lab.models.base import Detail, Encoder, TakesQueryPrompt, Vectors
from rerank_lab.models.forward import in_advance
from rerank_lab.timing import Clock

log = logging.getLogger(__name__)
CHUNK = {Detail.POOLED: 512, Detail.TOKENS: 512, Detail.STATES: 64}  # texts in a shard: tens of megabytes at most
MEMORY_BYTES = 2 << 30
MAPS = 32_768  # files that stay mapped at most; Linux allows a process 65,530
LOOK = 0.01  # share of the bound that must be written before the folder's size is checked again
TOUCH = 60.0  # seconds between two updates of a file's last use
DISK_BYTES = 16 << 30

ProgressCallback = Callable[[int, int], object]  # number of texts just encoded, number of texts to encode in all


def text_key(text: str, max_tokens: int, kind: str = "document", asked: str | None = None) -> bytes:
    """The cache's key (16 bytes) of a text at a token limit, as a document or as a query. `asked` is a prompt in place of the model's own."""
    kind = kind if asked is None else f"{kind} after {asked!r}"
    return hashlib.blake2b(f"{kind}\0{max_tokens}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(eq=False)
class Shard:
    """Vectors that were added by one call.

    Attributes:
        keys: of the texts, in order.
        detail: of the vectors.
        size: bytes that count towards the bound.
        path: of the file; None: the shard is only in memory.
        vectors: None until they are needed.
        used: last use, in the cache's counter of accesses.
        touched: when the file's last use was last updated (seconds since 1970).
        checked: whether the file's checksum was verified.
    """

    keys: list[bytes]
    detail: Detail
    size: int
    path: Path | None = None
    vectors: Vectors | None = None
    used: int = 0
    touched: float = 0.0
    checked: bool = False

    @classmethod
    def held(cls, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> Shard:
        """A shard in memory."""
        size = sum(t.numel() * t.element_size() for t in (vectors.pooled, vectors.tokens, vectors.states))
        return cls(list(keys), detail, size, None, vectors)

    def use(self, count: int) -> Vectors:
        """The vectors. Records the use: `count` is the cache's counter of accesses."""
        self.used = max(self.used, count)  # a cache that borrows the shard has a lower counter
        if self.path is not None and time.time() - self.touched > TOUCH:
            self.touched = time.time()
            with suppress(OSError):  # another process may have deleted it
                os.utime(self.path)
        assert self.vectors is not None
        return self.vectors


class VectorCache:
    """Vectors of one model.

    Args:
        model_key: everything that the vectors depend on besides text and token limit (Encoder.key).
        folder: path or URL for the shards; None: vectors are kept only in memory.
        memory_bytes: upper bound on vectors in memory, without a folder.
        disk_bytes: upper bound on this model's vectors in the folder, of all processes.
        about: a description of the model for people, stored beside its shards.
    """

    def __init__(
        self,
        model_key: str,
        folder: Path | str | None = None,
        memory_bytes: int = MEMORY_BYTES,
        disk_bytes: int = DISK_BYTES,
        about: Mapping[str, str] | None = None,
    ):
        self.store = None if folder is None else Store(folder).child(VECTORS).child(model_key)
        self.folder = None if self.store is None else self.store.folder
        self.about = dict(about or {})
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self._lock = threading.RLock()  # held while shards are added, dropped or borrowed
        self._shards: dict[int, Shard] = {}
        self._places: dict[bytes, tuple[int, int]] = {}
        self._next, self._dropped = 0, False
        self._held, self._count = 0, 0
        self._unseen = math.inf  # bytes written since the folder was last looked at
        self._mapped = 0
        self._known: set[str] = set()
        if self.folder is not None and self.folder.is_dir():
            for path in shards.abandoned(self.folder):
                with suppress(OSError):
                    path.unlink()
        self.refresh()

    def refresh(self) -> None:
        """Adds the shards that other processes have written since."""
        if self.store is not None and self.store.remote:
            sizes = self.store.names()
            found = [(name, size) for name, size in sorted(sizes.items()) if shards.is_shard(name)]
        else:
            found = [] if self.folder is None else [(path.name, size) for (_, _, size), path in shards.shards(self.folder)]
        for name, size in found:
            if name not in self._known:
                self._open(name, size)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def held_bytes(self) -> int:
        """Bytes of vectors in memory, without mapped files."""
        return self._held

    def has(self, key: bytes, detail: Detail) -> bool:
        """Whether the cache holds a text's vectors in at least this detail."""
        place = self._places.get(key)
        return place is not None and self._reads_back(place[0]) and self._shards[place[0]].detail >= detail

    def add(self, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> None:
        """Adds the vectors of N texts. If the folder cannot be written, the cache warns and goes on in memory."""
        if self.folder is None or self.store is None:
            self._register(Shard.held(keys, vectors, detail))
            return
        try:
            try:
                path = self._write(self.store, keys, vectors, detail)
            except (OSError, SafetensorError):  # another process may be clearing the folder
                path = self._write(self.store, keys, vectors, detail)
        except (OSError, SafetensorError) as error:
            log.warning("vector cache: %s cannot be written (%s); going on without it", self.store.shown, error)
            self.folder = None
            self.add(keys, vectors, detail)
            return
        number = self._open(path.name)
        self._unseen += 0 if number is None else self._shards[number].size
        if number is None or not self._reads_back(number):  # another process may have deleted the file already
            self._register(Shard.held(keys, vectors, detail))

    def _write(self, store: Store, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> Path:
        store.folder.mkdir(parents=True, exist_ok=True)
        store.write_once(shards.ABOUT, json.dumps(self.about, indent=1).encode())
        path = shards.write(store.folder, keys, vectors, detail)
        store.publish(path.name)
        return path

    def gather(self, keys: Sequence[bytes], detail: Detail) -> Vectors:
        """The vectors of N texts, in the order of their keys: pooled vectors, and token vectors above Detail.POOLED. For states, call `states`.

        Raises:
            KeyError: a text is not in the cache. Call `has` first.
        """
        nothing = torch.zeros(0, 0, dtype=torch.float16, device="cpu")
        runs = self._runs(keys)
        if not runs:
            none, first = nothing.float(), torch.zeros(1, dtype=torch.int64, device="cpu")
            return Vectors(none, first[:0], first, nothing, nothing)
        pooled = torch.cat([v.pooled[a:b] for v, a, b in runs])
        lengths = torch.cat([v.lengths[a:b] for v, a, b in runs])
        if not detail:
            return Vectors(pooled, lengths, torch.zeros(len(pooled) + 1, dtype=torch.int64, device="cpu"), nothing, nothing)
        counts = torch.cat([lengths.new_zeros(1), *(v.offsets[a : b + 1].diff() for v, a, b in runs)])
        tokens = torch.cat([v.tokens[int(v.offsets[a]) : int(v.offsets[b])] for v, a, b in runs])
        return Vectors(pooled, lengths, counts.cumsum(0), tokens, nothing)

    def _runs(self, keys: Sequence[bytes]) -> list[tuple[Vectors, int, int]]:
        """The rows of these texts as (a shard's vectors, first row, end row). Texts that follow each other in a shard share one entry."""
        self._count += 1
        runs: list[tuple[int, int, int]] = []
        for number, row in (self._places[key] for key in keys):
            if runs and runs[-1][0] == number and runs[-1][2] == row:
                runs[-1] = (number, runs[-1][1], row + 1)
            else:
                runs.append((number, row, row + 1))
        numbers = {number for number, _, _ in runs}
        if not all(self._reads_back(number) for number in numbers):
            raise KeyError("vectors that nobody asked `has` for, in a shard that does not read back")
        used = {number: self._shards[number].use(self._count) for number in numbers}
        return [(used[number], a, b) for number, a, b in runs]

    def states(self, keys: Sequence[bytes]) -> list[Tensor]:
        """The states of N texts, one tensor each (Ld × 2·d·S), as views, since copying costs as much as reading. Raises as `gather`."""
        return [v.states[int(v.offsets[row]) : int(v.offsets[row + 1])] for v, a, b in self._runs(keys) for row in range(a, b)]

    def borrow(self, other: VectorCache, keys: Sequence[bytes], detail: Detail) -> list[bytes]:
        """Takes over another cache's vectors of these texts without copying. They stay here if the other cache drops them.

        Returns:
            the keys that neither cache holds in this detail.
        """
        lacking = []
        with other._lock:
            other._count += 1
            for key in keys:
                if other.has(key, detail):
                    number, row = other._places[key]
                    shard = other._shards[number]
                    shard.use(other._count)
                    self._shards[id(shard)] = shard
                    self._places[key] = (id(shard), row)
                elif not self.has(key, detail):
                    lacking.append(key)
        return lacking

    def _open(self, name: str, size: int | None = None) -> int | None:
        """Registers a shard of the folder by reading its keys. Returns its number; None if it is gone, damaged or of another schema."""
        assert self.store is not None
        path = self.store.folder / name
        self._known.add(name)
        try:
            here = path.exists() or not self.store.remote
            found = shards.keys(path) if here else shards.keys_from(partial(self.store.head, name), path)
            if found is not None:
                return self._register(Shard(*found, path.stat().st_size if size is None else size, path))
        except (OSError, RuntimeError) as error:
            shards.warn_unreadable(path, error)
        return None

    def _reads_back(self, number: int) -> bool:
        """Maps a shard's vectors unless they already are. If that fails, the shard is dropped and the result is False."""
        shard = self._shards[number]
        if shard.vectors is None:
            assert shard.path is not None and self.store is not None
            try:
                shard.vectors = shards.read(self.store.fetch(shard.path.name), check=not shard.checked)
                if shard.vectors is None:
                    self.store.remove(shard.path.name)
                else:
                    self._mapped += 1
                    self._unseen += shard.size if self.store.remote and not shard.checked else 0
                    shard.checked = True
            except (OSError, RuntimeError) as error:
                shards.warn_unreadable(shard.path, error)
            if shard.vectors is None:
                self._drop(number)
        return shard.vectors is not None

    def _register(self, shard: Shard) -> int:
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._shards[number] = shard
            shard.used = self._count
            for row, key in enumerate(shard.keys):
                place = self._places.get(key)
                if place is None or self._shards[place[0]].detail <= shard.detail:
                    self._places[key] = (number, row)
            self._held += shard.size if shard.path is None else 0
            return number

    def trim(self) -> None:
        """Drops the least recently used vectors until the bounds hold. Call it only when no vectors are about to be gathered."""
        with self._lock:
            if self._held > self.memory_bytes:
                self._warn(self.memory_bytes, "in memory (a folder holds more)")
                held = sorted((shard.used, number) for number, shard in self._shards.items() if shard.path is None)
                while self._held > self.memory_bytes:
                    self._drop(held.pop(0)[1])
            if self._mapped > MAPS:
                self._unmap()
            if self.folder is not None and self._unseen > LOOK * self.disk_bytes:
                self._unseen = 0
                self._trim_folder(self.folder)

    def _unmap(self) -> None:
        """Unmaps the least recently used files, until half of MAPS are left. They are mapped again, without a check, when they are needed."""
        mapped = sorted((shard.used, number) for number, shard in self._shards.items() if shard.path is not None and shard.vectors is not None)
        for _, number in mapped[: max(0, len(mapped) - MAPS // 2)]:
            self._shards[number].vectors = None
        self._mapped = min(len(mapped), MAPS // 2)

    def _trim_folder(self, folder: Path) -> None:
        own = {shard.path: number for number, shard in self._shards.items() if shard.path is not None}
        files = shards.shards(folder)
        if self.store is not None and self.store.remote:
            self._trim_copy(files, own)
            return
        for gone in own.keys() - {path for _, path in files}:  # deleted by another process; a mapped file still takes disk space
            self._drop(own[gone])
        total = sum(size for ((_, _, size), _) in files)
        for (_, _, size), path in files:
            if total <= self.disk_bytes:
                return
            self._warn(self.disk_bytes, f"in {folder} (--cache-gb, cache_bytes)")
            total -= size
            if path in own:
                self._drop(own[path])
            with suppress(OSError):  # another process may have deleted it
                path.unlink()

    def _trim_copy(self, files: Sequence[tuple[tuple[int, str, int], Path]], own: Mapping[Path, int]) -> None:
        """Deletes local copies of files behind a URL. They are fetched again when they are needed."""
        total = sum(size for ((_, _, size), _) in files)
        for (_, _, size), path in files:
            if total <= self.disk_bytes:
                return
            total -= size
            if path in own:
                self._shards[own[path]].vectors, self._shards[own[path]].checked = None, False
            path.unlink(missing_ok=True)

    def _warn(self, bound: int, where: str) -> None:
        if not self._dropped:
            log.warning(
                "vector cache: more than %.1f GB of vectors %s; those not used for longest are dropped, and timed again where they are made again",
                bound / 1e9, where,
            )  # fmt: skip
        self._dropped = True

    def _drop(self, number: int) -> None:
        shard = self._shards.pop(number)
        self._held -= shard.size if shard.path is None else 0
        for key in shard.keys:
            if self._places.get(key, (-1, 0))[0] == number:
                del self._places[key]


def ensure(
    encoder: Encoder,
    cache: VectorCache,
    texts: Sequence[str],
    *,
    max_tokens: int,
    detail: Detail,
    kind: str = "document",
    progress: ProgressCallback = lambda done, total: None,
    keep: bool = True,
    clock: Clock | None = None,
) -> list[bytes]:
    """Encodes those of N texts that the cache lacks, each distinct text once. After an interruption, finished chunks stay in the folder.

    Args:
        encoder, cache: of the same model.
        texts: N strings; repeated ones are allowed.
        max_tokens: tokens kept of each text, special ones not counted; the model's limit applies too.
        detail: the detail that is wanted of each text.
        kind: "document" or "query", which chooses the model's prompt.
        progress: called after each batch.
        keep: False if no vectors are gathered afterwards, so that the cache may be trimmed after each chunk.
        clock: measures tokenising. After the first chunk, texts are tokenised ahead, and only the encoder's waiting counts.

    Returns:
        the cache's key of each of the N texts.
    """
    asked = encoder.asked_query_prompt if kind == "query" and isinstance(encoder, TakesQueryPrompt) else None
    keys = [text_key(text, min(max_tokens, encoder.limit), kind, asked) for text in texts]
    distinct = dict(zip(keys, texts))
    new, size = [key for key in distinct if not cache.has(key, detail)], CHUNK[detail]
    lacking, every = set(new), list(distinct)
    # Chunks are cut from all texts, not from the missing ones, so that a chunk does not depend on what is cached already.
    parts = ([key for key in every[start : start + size] if key in lacking] for start in range(0, len(every), size))
    chunks = [part for part in parts if part]
    tokenised = in_advance(partial(encoder.tokenize, [distinct[key] for key in chunk], kind, max_tokens) for chunk in chunks)
    clock = clock or Clock()
    for chunk in chunks:
        with clock.phase("tokenise"):
            tokens = next(tokenised)
        cache.add(chunk, encoder.encode_tokens(tokens, detail=detail, progress=lambda done: progress(done, len(new))), detail)
        if not keep:
            cache.trim()
    return keys
