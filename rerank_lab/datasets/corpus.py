"""A collection's texts on disk: ids in memory, texts read by position, on whichever machine they are wanted."""

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

PART = 16_384, 1 << 25  # texts and bytes of a file, whichever comes first


@dataclass(frozen=True)
class Texts:
    """Texts by position; holds names of files alone, so that it travels.

    Attributes:
        place: the folder or URL of the files.
        parts: their names, in order; each is named after its content.
        starts: position of each one's first text, and the number of texts.
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
            OSError: their file is gone.
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
    """id → text, in the order in which they were added. In memory are ids and a digest of each text.

    Args:
        cache: the folder or URL that everybody who reads it reaches.
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
        """Puts what waits into a file; one that is there already has the same content."""
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in self._waiting])]).astype(np.int64)
        content = save({"offsets": offsets, "texts": np.frombuffer(b"".join(self._waiting) or b"\0", dtype=np.uint8)})
        name = f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.safetensors"
        if name not in self.store.names():
            self.store.write(name, content)
        self._parts.append(name)
        self._starts.append(len(self.ids))
        self._waiting, self._size = [], 0

    @property
    def texts(self) -> Texts:
        """What reads them by position, here or elsewhere."""
        if self._waiting:
            self._write()
        if self._reader is None or len(self._reader) != len(self.ids):
            self._reader = Texts(self.store.place, tuple(self._parts), tuple(self._starts))
        return self._reader

    _reader: Texts | None = None

    def __getitem__(self, identifier: str) -> str:
        return self.texts.read([self._places[identifier]])[0]

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, identifiers: Sequence[str]) -> np.ndarray:
        """Where documents stand, int64."""
        return np.array([self._places[i] for i in identifiers], dtype=np.int64)

    def distinct(self, positions: np.ndarray) -> np.ndarray:
        """Of these positions the first of each text, in their order."""
        values = np.frombuffer(bytes(self._digests), dtype=[("a", "<u8"), ("b", "<u8")])[positions]
        return positions[np.sort(np.unique(values, return_index=True)[1])]

    def digest(self, position: int) -> bytes:
        """16 bytes that stand for a text."""
        return bytes(self._digests[16 * position : 16 * position + 16])


def digests(corpus: Mapping[str, str]) -> Iterator[bytes | str]:
    """What tells texts apart, one a document: the text itself where it is in memory."""
    if isinstance(corpus, Corpus):
        yield from (corpus.digest(n) for n in range(len(corpus)))
    else:
        yield from corpus.values()
