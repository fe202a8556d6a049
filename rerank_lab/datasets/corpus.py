"""A corpus on disk. Ids are in memory; texts are read by position, on any machine that reaches the files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from safetensors.numpy import save
from safetensors.torch import load_file
from torch import Tensor

from rerank_lab.cache.places import TEXTS
from rerank_lab.cache.store import Store

PART = 16_384, 1 << 25  # a file is full at this many texts, or at this many bytes


@dataclass(frozen=True)
class TextFiles:
    """Files of texts, read by position. Only names of files are held, so that pickling it is cheap.

    Attributes:
        place: the folder or URL of the files.
        parts: names of the files, in order. Each is a hash of the file's content.
        starts: the position of each file's first text, then the number of all texts.
    """

    place: str
    parts: tuple[str, ...]
    starts: tuple[int, ...]
    _open: dict[int, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
        return self.place, self.parts, self.starts

    def __setstate__(self, state: tuple[str, tuple[str, ...], tuple[int, ...]]) -> None:
        for name, value in zip(("place", "parts", "starts", "_open"), (*state, {})):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def _store(self) -> Store:
        return Store(self.place)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        """The texts at these positions, in that order.

        Raises:
            OSError: a file is gone.
        """
        found = []
        for position, part in zip(positions, np.searchsorted(self.starts, positions, side="right") - 1):
            if part not in self._open:
                self._open[part] = load_file(self._store.fetch(self.parts[part]))
            tensors, row = self._open[part], int(position) - self.starts[part]
            a, b = tensors["offsets"][row : row + 2].tolist()
            found.append(tensors["texts"][a:b].numpy().tobytes().decode())
        return found


class Corpus(Mapping[str, str]):
    """Document id → text, in the order of addition. Texts are on disk; ids and a digest of each text are in memory.

    Args:
        cache: a folder or URL that all readers reach. The texts go into a folder inside.
    """

    def __init__(self, cache: Store):
        self.store = cache.child(TEXTS)
        self.ids: list[str] = []
        self._places: dict[str, int] = {}
        self._digests = bytearray()
        self._parts: list[str] = []
        self._starts = [0]
        self._waiting: list[bytes] = []
        self._size = 0

    def __setitem__(self, identifier: str, text: str) -> None:
        encoded = text.encode()
        self._places[identifier] = len(self.ids)
        self.ids.append(identifier)
        self._digests += hashlib.blake2b(encoded, digest_size=16).digest()
        self._waiting.append(encoded)
        self._size += len(encoded)
        if len(self._waiting) >= PART[0] or self._size >= PART[1]:
            self._write()

    def _write(self) -> None:
        """Writes the waiting texts to a file. A file of that name that exists has the same content."""
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in self._waiting])]).astype(np.int64)
        content = save({"offsets": offsets, "texts": np.frombuffer(b"".join(self._waiting) or b"\0", dtype=np.uint8)})
        name = f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.safetensors"
        if name not in self.store.names():
            self.store.write(name, content)
        self._parts.append(name)
        self._starts.append(len(self.ids))
        self._waiting, self._size = [], 0

    @property
    def texts(self) -> TextFiles:
        """The files of all texts, for reading by position here or on another machine."""
        if self._waiting:
            self._write()
        if self._reader is None or len(self._reader) != len(self.ids):
            self._reader = TextFiles(self.store.place, tuple(self._parts), tuple(self._starts))
        return self._reader

    _reader: TextFiles | None = None

    def __getitem__(self, identifier: str) -> str:
        return self.texts.read([self._places[identifier]])[0]

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, identifiers: Sequence[str]) -> np.ndarray:
        """Positions of these documents, int64."""
        return np.array([self._places[i] for i in identifiers], dtype=np.int64)

    def distinct(self, positions: np.ndarray) -> np.ndarray:
        """The positions without repeated texts: of each text the first, in the given order."""
        values = np.frombuffer(bytes(self._digests), dtype=[("a", "<u8"), ("b", "<u8")])[positions]
        return positions[np.sort(np.unique(values, return_index=True)[1])]

    def digest(self, position: int) -> bytes:
        """The digest (16 bytes) of the text at a position."""
        return bytes(self._digests[16 * position : 16 * position + 16])


def digests(corpus: Mapping[str, str]) -> Iterator[bytes | str]:
    """For each document a value that is equal for equal texts: the digest, or the text itself if it is in memory."""
    if isinstance(corpus, Corpus):
        yield from (corpus.digest(n) for n in range(len(corpus)))
    else:
        yield from corpus.values()
