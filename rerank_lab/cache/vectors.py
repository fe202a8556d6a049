"""Vectors that are made once: a cache by (model, token limit, text), in memory and, where a folder is given, on disk.

On disk a model's vectors are shards, one file for each call of `add` (shards.py), in a folder or where a URL says (store.py). Opening reads their keys alone; a shard is
checked when something of it is first wanted, and one that does not read back (cut short, wrong checksum) is deleted with a warning
and its texts are encoded again.
Past a bound in bytes the shards go that were not used for longest, whichever process wrote or used them: the time of a file is its
last use, to the minute. A file that one process deletes stays readable to another that has mapped
it, until that one has written something and trims. What a URL names is never trimmed; the bound is then on its copy here.
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
from rerank_lab.models.base import Detail, Encoder, Vectors
from rerank_lab.models.forward import in_advance
from rerank_lab.timing import Clock

log = logging.getLogger(__name__)
CHUNK = {Detail.POOLED: 512, Detail.TOKENS: 512, Detail.STATES: 64}  # texts a shard, tens of megabytes at most
MEMORY_BYTES = 2 << 30
MAPS = 32_768  # files that stay mapped; Linux lets a process have 65,530
LOOK = 0.01  # of the bound, so much must be written before the folder is looked at again
TOUCH = 60.0  # seconds between two notes of a shard's use
DISK_BYTES = 16 << 30

Progress = Callable[[int, int], object]


def text_key(text: str, max_tokens: int, kind: str = "document") -> bytes:
    """16 bytes that stand for a text at a token limit, as a document or as a query."""
    return hashlib.blake2b(f"{kind}\0{max_tokens}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(eq=False)
class Shard:
    """Vectors that were added together.

    Attributes:
        keys: of the texts, in order.
        size: bytes that count against a bound.
        path: where it lies; None: held by the process.
        vectors: None until something of it is wanted.
        used: when it was last, on the cache's own count.
        touched: when that was last noted in the file's time.
        checked: whether the file was found whole.
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
        """One that is kept in memory."""
        size = sum(t.numel() * t.element_size() for t in (vectors.pooled, vectors.tokens, vectors.states))
        return cls(list(keys), detail, size, None, vectors)

    def use(self, count: int) -> Vectors:
        """Its vectors, and a note that they were wanted."""
        self.used = max(self.used, count)  # a cache that has borrowed it counts from 0
        if self.path is not None and time.time() - self.touched > TOUCH:
            self.touched = time.time()
            with suppress(OSError):  # another process may have dropped it
                os.utime(self.path)
        assert self.vectors is not None
        return self.vectors


class VectorCache:
    """Vectors of one model.

    Args:
        model_key: what the vectors depend on besides text and token limit (BiEncoder.key).
        folder: where shards are kept, a path or a URL; None: in memory alone.
        memory_bytes: bound on what is held in memory without a folder.
        disk_bytes: bound on what the folder holds of this model, whichever process put it there.
        about: what tells people which model this is, kept beside its shards.
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
        self._lock = threading.RLock()  # of what is written; a reader's own texts are in its way only where it borrowed them
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
        """Takes the shards that others have added since."""
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
        """Vectors in memory."""
        return self._held

    def has(self, key: bytes, detail: Detail) -> bool:
        """Whether the text's vectors are here, in at least this detail."""
        place = self._places.get(key)
        return place is not None and self._reads_back(place[0]) and self._shards[place[0]].detail >= detail

    def add(self, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> None:
        """Keeps the vectors of N texts; on disk first, where there is a folder."""
        if self.folder is None or self.store is None:
            self._register(Shard.held(keys, vectors, detail))
            return
        try:
            try:
                path = self._write(self.store, keys, vectors, detail)
            except (OSError, SafetensorError):  # another process may just be clearing the folder
                path = self._write(self.store, keys, vectors, detail)
        except (OSError, SafetensorError) as error:
            log.warning("vector cache: %s cannot be written (%s); going on without it", self.store.shown, error)
            self.folder = None
            self.add(keys, vectors, detail)
            return
        number = self._open(path.name)
        self._unseen += 0 if number is None else self._shards[number].size
        if number is None or not self._reads_back(number):  # another process may have dropped the file already
            self._register(Shard.held(keys, vectors, detail))

    def _write(self, store: Store, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> Path:
        store.folder.mkdir(parents=True, exist_ok=True)
        if not (store.folder / shards.ABOUT).is_file():
            store.write(shards.ABOUT, json.dumps(self.about, indent=1).encode())
        path = shards.write(store.folder, keys, vectors, detail)
        store.publish(path.name)
        return path

    def gather(self, keys: Sequence[bytes], detail: Detail) -> Vectors:
        """The vectors of N texts that are all here, in that order; `detail` and no more, states left to `states`."""
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
        """Where the vectors of these texts stand: rows a to b of a shard, as long as they follow each other there."""
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
        """The states of N texts that are all here in that detail, one tensor each: views, since to copy them costs as much as to read them."""
        return [v.states[int(v.offsets[row]) : int(v.offsets[row + 1])] for v, a, b in self._runs(keys) for row in range(a, b)]

    def borrow(self, other: VectorCache, keys: Sequence[bytes], detail: Detail) -> list[bytes]:
        """Shares what another cache holds of these texts, so that it stays here when it is dropped there.

        Returns:
            the keys that neither holds in this detail.
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
        """Takes the keys of a shard that lies in the folder; its number, None where it is gone, of another schema or damaged."""
        assert self.store is not None
        path = self.store.folder / name
        self._known.add(name)
        try:
            here = path.exists() or not self.store.remote
            found = shards.keys(path) if here else shards.keys_from(partial(self.store.head, name), path)
            if found is not None:
                return self._register(Shard(*found, path.stat().st_size if size is None else size, path))
        except (OSError, RuntimeError) as error:
            shards.leave(path, error)
        return None

    def _reads_back(self, number: int) -> bool:
        """Whether a shard's vectors are here and whole; one that is not is dropped."""
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
                shards.leave(shard.path, error)
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
        """Drops what was not used for longest, past the bounds; called when nothing is about to be gathered."""
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
        """Lets half of the files go that were not used for longest; they are mapped again, unchecked, when they are wanted."""
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
        for gone in own.keys() - {path for _, path in files}:  # dropped by another process: as long as it is mapped, it fills the disk
            self._drop(own[gone])
        total = sum(size for ((_, _, size), _) in files)
        for (_, _, size), path in files:
            if total <= self.disk_bytes:
                return
            self._warn(self.disk_bytes, f"in {folder} (--cache-gb, cache_bytes)")
            total -= size
            if path in own:
                self._drop(own[path])
            with suppress(OSError):  # another process may have dropped it
                path.unlink()

    def _trim_copy(self, files: Sequence[tuple[tuple[int, str, int], Path]], own: Mapping[Path, int]) -> None:
        """Of what lies elsewhere, drops copies here: they are fetched again when they are wanted."""
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
    progress: Progress = lambda done, total: None,
    keep: bool = True,
    clock: Clock | None = None,
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
        clock: where the time that tokenising takes is booked; after the first chunk it is what the encoder waits for.
    """
    keys = [text_key(text, min(max_tokens, encoder.limit), kind) for text in texts]
    distinct = dict(zip(keys, texts))
    new, size = [key for key in distinct if not cache.has(key, detail)], CHUNK[detail]
    lacking, every = set(new), list(distinct)
    # What is read together stands together in the texts, wherever they are read and whatever is here already.
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
