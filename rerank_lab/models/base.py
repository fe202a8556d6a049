"""What a model must offer: an Encoder makes vectors of texts, a Scorer makes logits of pairs. Whoever runs them knows these two alone.

A new kind of model is a file beside this one and a line in models/kinds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor


class Detail(IntEnum):
    """How much of a text is kept; each level holds what those before it hold."""

    POOLED = 0
    TOKENS = 1  # and token vectors
    STATES = 2  # and the keys and values of the upper half of the layers, which a one-way cross-encoder reads


@dataclass(frozen=True)
class Vectors:
    """N encoded texts. What was not asked for has no rows.

    Attributes:
        pooled: N × d, fp32, as the model's own modules pool and normalise.
        lengths: N, int64, tokens before truncation, special ones not counted.
        offsets: N + 1, int64, into tokens and states; all 0 where neither was asked for.
        tokens: nnz × r, fp16, unit vectors on the model's subspace, special tokens left out.
        states: nnz × 2·d·S, fp16, keys and values of each of the upper S layers in turn, of the same tokens.
    """

    pooled: Tensor
    lengths: Tensor
    offsets: Tensor
    tokens: Tensor
    states: Tensor

    def to(self, device: torch.device) -> Vectors:
        """The same on another device."""
        if device.type == "cpu" and self.pooled.device.type == "cpu":  # where those are, the others are too
            return self
        return Vectors(*(getattr(self, field.name).to(device) for field in fields(self)))

    def row(self, i: int) -> Vectors:
        """Text i alone; views."""
        a, b = int(self.offsets[i]), int(self.offsets[i + 1])
        states = self.states[a:b] if len(self.states) else self.states
        return Vectors(self.pooled[i : i + 1], self.lengths[i : i + 1], self.offsets[i : i + 2] - a, self.tokens[a:b], states)


@dataclass(frozen=True)
class Read:
    """A query of Lq tokens, special ones included, as an encoder sees it.

    Attributes:
        vectors: its own (N = 1).
        own: Lq, bool, false at special tokens.
        start, last: 1 × Lq × d states where the upper half of the layers begins and of the last layer; None unless Detail.STATES was asked for.
    """

    vectors: Vectors
    own: Tensor
    start: Tensor | None = None
    last: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text or a pair as a model reads it, special tokens included.

    Attributes:
        ids: L, int32.
        types: L, int8, the segment of each.
        special: L, bool.
        wanted: tokens before truncation, special ones not counted.
    """

    ids: np.ndarray
    types: np.ndarray
    special: np.ndarray
    wanted: int

    @classmethod
    def of(cls, encoding: Encoding, wanted: int) -> Tokens:
        """From the tokenizer's own object."""
        mask = np.array(encoding.special_tokens_mask, dtype=bool)
        return cls(np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.int8), mask, wanted)

    def __len__(self) -> int:
        return len(self.ids)


class Model(Protocol):
    """What encoders and scorers share.

    Attributes:
        name: what messages and results call it.
        device: where it is.
        limit: own tokens of a text that it can read; a scorer of pairs shares them between query and document.
        runtime, precision: what runs the transformer, and in which type of number.
    """

    name: str

    @property
    def device(self) -> torch.device: ...
    @property
    def limit(self) -> int: ...
    @property
    def runtime(self) -> str: ...
    @property
    def precision(self) -> str: ...

    def reading(self) -> str:
        """What the checkpoint asks for beyond a plain reading, as JSON for results; "" where that is nothing."""


@runtime_checkable
class Encoder(Model, Protocol):
    """Makes pooled and token vectors of texts; queries and documents may have a prompt each.

    Attributes:
        specials: special tokens of a text.
        dimensions, token_dimensions: columns of pooled and of token vectors.
        similarity: how pooled vectors are compared: "cosine" or "dot".
    """

    specials: int

    @property
    def dimensions(self) -> int: ...
    @property
    def token_dimensions(self) -> int: ...
    @property
    def similarity(self) -> str: ...

    def key(self) -> str:
        """Names everything but text and token limit that a document's vectors depend on."""

    def about(self) -> Mapping[str, str]:
        """What people know the vectors of this `key` by."""

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """Texts of a kind ("query" or "document") as the model reads them, cut to so many own tokens."""

    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail, progress: Callable[[int], object] = ...) -> Vectors:
        """Vectors of N texts in this detail.

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """

    def read(self, queries: Sequence[Tokens], *, detail: Detail) -> list[Read]:
        """Queries as vectors and, at Detail.STATES, as the states that a scorer goes on from."""

    def words(self, tokens: Tokens) -> list[str]:
        """A text's own tokens as they are written, without special ones."""

    def flops(self, lengths: Tensor, detail: Detail) -> int:
        """FLOPs of encoding texts of these own tokens."""


@dataclass(frozen=True)
class Needs:
    """Whose cached vectors of a document a scorer reads, and in which detail."""

    encoder: Encoder
    detail: Detail


@dataclass(frozen=True, eq=False)
class Inputs:
    """A query with N documents, as a scorer takes them.

    Attributes:
        query, texts: any strings.
        max_tokens: own tokens kept of each document.
        read: the query as the encoder of the scorer's `needs` sees it; None where it needs none.
        vectors, states: of the documents, in the detail of its `needs`; states one tensor a document.
    """

    query: str
    texts: Sequence[str]
    max_tokens: int
    read: Read | None = None
    vectors: Vectors | None = None
    states: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Work:
    """A part of a scorer's work that is not divided.

    Attributes:
        positions: documents of the inputs that it scores.
        size: tokens, for budgets.
        cut: whether something of the query or the documents was cut off; known of scorers that read pairs.
    """

    positions: Sequence[int]
    size: int
    cut: bool


@runtime_checkable
class Scorer(Model, Protocol):
    """Scores pairs of a query and a document.

    Attributes:
        needs: what it reads of a document beside its text; None: it reads pairs of texts.
        fingerprint: hash of what decides its output.
        shares: whether work of several queries may run in one forward.
    """

    fingerprint: str
    shares: bool

    @property
    def needs(self) -> Needs | None: ...

    def work(self, inputs: Inputs) -> Sequence[Work]:
        """Tokenises, where there is something to tokenise, and divides what is to be done. Any thread may call it."""

    def logits(self, work: Sequence[Work]) -> Tensor:
        """One logit a position, in the order of the work (fp32, on the CPU).

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """

    def flops(self, work: Sequence[Work]) -> int:
        """FLOPs of it; documents' vectors that it reads are at hand."""
