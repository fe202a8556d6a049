"""The two protocols of models: an Encoder makes vectors of texts, a Scorer makes logits of pairs. The rest of the package uses only these.

To add a kind of model, write a file in this folder and a line in models/kinds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor


class Detail(IntEnum):
    """How much is kept of an encoded text. Each level contains the levels before it."""

    POOLED = 0
    TOKENS = 1  # and token vectors
    STATES = 2  # and keys and values of the upper half of the layers, for a one-way cross-encoder


@dataclass(frozen=True)
class Overrides:
    """What a person asks of a model in place of what its folder says. None: as the folder has it.

    Attributes:
        query_prompt, document_prompt: put before an encoder's queries and documents; "" for no prompt.
        truncate_dim: components kept of a pooled vector (Matryoshka).
        instruction: the task that is told to a scorer whose prompt has a place for one.
    """

    query_prompt: str | None = None
    document_prompt: str | None = None
    truncate_dim: int | None = None
    instruction: str | None = None


AS_IT_IS = Overrides()


@dataclass(frozen=True)
class Origin:
    """What decides an encoder's token vectors, apart from device, runtime and precision.

    Attributes:
        weights: hash of the weights.
        reading: hash of what else the folder's JSON files say of them, such as the number of heads and the limit.
        projection: hash of what makes token vectors of the last hidden states: a subspace or layers of their own; "" for nothing.
        query_prompt, document_prompt: put before texts.
    """

    weights: str
    reading: str
    projection: str
    query_prompt: str
    document_prompt: str


@dataclass(frozen=True)
class Vectors:
    """N encoded texts with nnz tokens together. Tensors of a detail that was not asked for have no rows.

    Attributes:
        pooled: N × d, fp32, pooled and normalised by the model's own modules; N × 0 if the encoder does not pool.
        lengths: N, int64, tokens before truncation, special ones not counted.
        offsets: N + 1, int64, into tokens and states: text i has the rows offsets[i] to offsets[i + 1]. All 0 without tokens.
        tokens: nnz × r, unit vectors. fp16, on the model's subspace, special tokens left out. From a model that is trained on token
            vectors (late interaction): fp32, of the tokens that its own score counts.
        states: nnz × 2·d·S, fp16, keys and values of each of the upper S layers in turn, of the same tokens.
    """

    pooled: Tensor
    lengths: Tensor
    offsets: Tensor
    tokens: Tensor
    states: Tensor

    def to(self, device: torch.device) -> Vectors:
        """The same on another device."""
        if device.type == "cpu" and self.pooled.device.type == "cpu":  # all tensors are on the same device
            return self
        return Vectors(*(getattr(self, field.name).to(device) for field in fields(self)))

    def row(self, i: int) -> Vectors:
        """The vectors of text i (N = 1), as views."""
        a, b = int(self.offsets[i]), int(self.offsets[i + 1])
        states = self.states[a:b] if len(self.states) else self.states
        return Vectors(self.pooled[i : i + 1], self.lengths[i : i + 1], self.offsets[i : i + 2] - a, self.tokens[a:b], states)


@dataclass(frozen=True, eq=False)
class SparseVectors:
    """N texts' weights of words; those that are 0 are left out.

    Attributes:
        ends: N + 1, int64, into the others: text i has the entries ends[i] to ends[i + 1].
        words: nnz, int32, numbers of words in the vocabulary, rising within a text.
        weights: nnz, fp32, above 0.
    """

    ends: np.ndarray
    words: np.ndarray
    weights: np.ndarray

    @classmethod
    def join(cls, parts: Iterable[SparseVectors]) -> SparseVectors:
        """The texts of all parts, in order."""
        every = list(parts)
        counts = np.concatenate([np.zeros(1, dtype=np.int64), *(np.diff(part.ends) for part in every)])
        words = np.concatenate([np.zeros(0, dtype=np.int32), *(part.words for part in every)])
        return cls(np.cumsum(counts), words, np.concatenate([np.zeros(0, dtype=np.float32), *(part.weights for part in every)]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def taken(self, texts: np.ndarray) -> SparseVectors:
        """The texts at these positions, in this order."""
        counts = np.diff(self.ends)[texts]
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        rows = np.repeat(self.ends[:-1][texts] - ends[:-1], counts) + np.arange(ends[-1])
        return SparseVectors(ends, self.words[rows], self.weights[rows])


@dataclass(frozen=True)
class EncodedQuery:
    """A query of Lq tokens, special ones included, encoded.

    Attributes:
        vectors: of the query (N = 1).
        own: Lq, bool, false at special tokens.
        start: 1 × Lq × d, the hidden states that go into the upper half of the layers; None below Detail.STATES.
        last: 1 × Lq × d, the hidden states of the last layer; None below Detail.STATES.
    """

    vectors: Vectors
    own: Tensor
    start: Tensor | None = None
    last: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Tokens:
    """The L tokens of a text or a pair, special ones included.

    Attributes:
        ids: L, int32.
        types: L, int8, the segment of each token.
        special: L, bool, true at tokens that get no token vector: special ones, unless the model counts them.
        full_length: number of tokens before truncation, special ones not counted.
        attended: how many tokens, from the first, the others attend to; None: all of them.
        unpooled: how many tokens, from the first, the pooling leaves out.
    """

    ids: np.ndarray
    types: np.ndarray
    special: np.ndarray
    full_length: int
    attended: int | None = None
    unpooled: int = 0

    @classmethod
    def of(cls, encoding: Encoding, full_length: int, unpooled: int = 0) -> Tokens:
        """Makes Tokens of the tokenizer's Encoding."""
        mask = np.array(encoding.special_tokens_mask, dtype=bool)
        return cls(np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.int8), mask, full_length, unpooled=unpooled)

    def __len__(self) -> int:
        return len(self.ids)


class Model(Protocol):
    """What encoders and scorers share.

    Attributes:
        name: what messages and results call it.
        device: where it runs.
        limit: how many tokens of a text it can read, special ones not counted. For a scorer of pairs, query and document together.
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

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know of how it reads, such as prompts that it has none of: a sentence each, without its name."""

    def reading(self) -> str:
        """Settings of the checkpoint that differ from the defaults (similarity, prompts, dimensions), as JSON for results; "" without any."""


@runtime_checkable
class Encoder(Model, Protocol):
    """Makes pooled vectors and token vectors of texts. Queries and documents may have different prompts.

    Attributes:
        specials: number of special tokens of a text.
        pools: whether it makes a vector of a whole text. A late-interaction model makes token vectors alone.
        dimensions, token_dimensions: columns of pooled vectors (0 if it does not pool) and of token vectors.
        similarity: how pooled vectors are compared: "cosine" or "dot"; "maxsim", of token vectors, if it does not pool.
    """

    specials: int
    pools: bool

    @property
    def dimensions(self) -> int: ...
    @property
    def token_dimensions(self) -> int: ...
    @property
    def similarity(self) -> str: ...

    def key(self) -> str:
        """A hash of everything that a document's vectors depend on, apart from its text and the token limit. Caches use it."""

    def about(self) -> Mapping[str, str]:
        """A description of the vectors with this `key`, for people: at least model, arithmetic and token_dimensions."""

    def origin(self) -> Origin:
        """What decides its token vectors, wherever they are computed."""

    def prompt(self, kind: str) -> str:
        """What the model puts before a text of a kind, "query" or "document"."""

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """Tokenises texts of a kind ("query" or "document") with its prompt, and cuts each to max_tokens tokens, special ones not counted."""

    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail, progress: Callable[[int], object] = ...) -> Vectors:
        """Vectors of N texts in this detail. `progress` is called after each batch with its number of texts.

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """

    def encode_queries(self, queries: Sequence[Tokens], *, detail: Detail) -> list[EncodedQuery]:
        """Encodes queries. At Detail.STATES they keep hidden states, from which a scorer continues."""

    def words(self, tokens: Tokens) -> list[str]:
        """The tokens as strings, special ones left out."""

    def flops(self, lengths: Tensor, detail: Detail) -> int:
        """FLOPs of encoding N texts of these lengths (N, int64, special tokens not counted)."""


@runtime_checkable
class TakesQueryPrompt(Protocol):
    """An encoder that can be asked for another prompt before queries than its folder has.

    Attributes:
        asked_query_prompt: the prompt that is asked for; None: none, or the folder's own. Caches keep its queries apart.
    """

    asked_query_prompt: str | None


@dataclass(frozen=True)
class Needs:
    """What a scorer reads of a document besides its text: vectors of this encoder, in this detail."""

    encoder: Encoder
    detail: Detail


@dataclass(frozen=True, eq=False)
class Inputs:
    """The input of a scorer: a query with N documents.

    Attributes:
        query, texts: any strings; N texts.
        max_tokens: tokens kept of each document, special ones not counted.
        encoded_query: the query, encoded by the encoder that the scorer needs; None if it needs no encoder.
        vectors: of the documents, in the detail that the scorer needs; None if it needs no encoder.
        states: one tensor for each document, Ld × 2·d·S, as Vectors.states; empty if the scorer does not need them.
    """

    query: str
    texts: Sequence[str]
    max_tokens: int
    encoded_query: EncodedQuery | None = None
    vectors: Vectors | None = None
    states: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class WorkItem:
    """The smallest part of a scorer's work that runs as a whole.

    Attributes:
        positions: of the documents that it scores, in the inputs.
        size: number of tokens, for the budget of a batch.
        cut: whether the query or a document was cut. Set only by scorers that read pairs.
    """

    positions: Sequence[int]
    size: int
    cut: bool


@runtime_checkable
class Scorer(Model, Protocol):
    """Scores pairs of a query and a document.

    Attributes:
        needs: the vectors of a document that it reads; None: it reads pairs of texts.
        fingerprint: hash of everything that its output depends on.
        shares: whether work items of several queries may run in one forward.
    """

    fingerprint: str
    shares: bool

    @property
    def needs(self) -> Needs | None: ...

    def work(self, inputs: Inputs) -> Sequence[WorkItem]:
        """Splits the scoring of these inputs into work items, and tokenises if needed. Any thread may call it."""

    def logits(self, work: Sequence[WorkItem]) -> Tensor:
        """Runs work items: one logit for each of their positions, in order (fp32, on the CPU).

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """

    def flops(self, work: Sequence[WorkItem]) -> int:
        """FLOPs of running these work items. Encoding the documents' vectors is not counted."""
