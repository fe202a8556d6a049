"""A ranking in steps: the same work as Reranker.score, cut where forwards can be shared with other rankings.

A method is a function of its pool. Here the pool never runs a model: where it lacks something it raises Missing, and the
method is run again once the units of work that make it have been. Scoring again costs a fraction of any forward, and no
method knows of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rerank_lab.methods import Pool
from rerank_lab.models.bi_encoder import BiEncoder, Detail, Read, Vectors
from rerank_lab.models.cache import VectorCache, text_key
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.forward import Tokens
from rerank_lab.models.one_way import OneWayCrossEncoder
from rerank_lab.reranker import Ranking, Reranker


def _tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


class Missing(Exception):
    """What a pool lacks.

    Attributes:
        units: the work that makes it, longest first.
    """

    def __init__(self, units: Sequence[Unit]):
        super().__init__(f"{len(units)} units")
        self.units = units


class Steps:
    """One ranking: run `units`, in any batches and any company, then `advance`, until that gives a ranking.

    Args:
        reranker: models, method and settings; a cache in memory.
        query, texts: as for Reranker.score. They are tokenised here, which any thread may do.

    Attributes:
        units: to be run before the next `advance`.

    Raises:
        UserError: as Reranker.score.
    """

    def __init__(self, reranker: Reranker, query: str, texts: Sequence[str]):
        self.reranker, self.pool = reranker, reranker.pool(StepPool, query, texts)
        self.units: Sequence[Unit] = self.pool.first(reranker.method.roles)

    def advance(self) -> Ranking | None:
        """The ranking, or None where it takes more units.

        Raises:
            ModelError: a NaN score.
        """
        try:
            return self.reranker.finish(self.pool)
        except Missing as missing:
            self.units = missing.units
            return None


class StepPool(Pool):
    """A pool that says what it lacks."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        shared = [self.cache, self.cross_cache]
        # What is borrowed from the shared cache stays for as long as this ranking needs it.
        self.cache = None if shared[0] is None else VectorCache("")
        self.cross_cache = self.cache if shared[1] is shared[0] else None if shared[1] is None else VectorCache("")
        self._shared = {id(own): cache for own, cache in zip((self.cache, self.cross_cache), shared)}
        self.seen = self.new = 0  # distinct documents whose vectors were wanted at first, by where they were
        self.logit: dict[int, tuple[float, int, bool]] = {}  # position → logit, tokens of the pair, whether it was cut

    def first(self, roles: Sequence[str]) -> list[Unit]:
        """Everything that is known to be needed, so that it can share a batch."""
        if "bi-encoder" in roles:
            encoder, cache, detail = self.encoder, self.cache, self.detail
        elif isinstance(self.cross, OneWayCrossEncoder):
            encoder, cache, detail = self.cross.encoder, self.cross_cache, Detail.STATES
        else:
            assert self.cross is not None
            return self._pairs(self.cross, sorted(set(self._first.tolist())))
        assert encoder is not None and cache is not None
        keys, texts = self._texts(encoder, cache, self.documents, detail)
        self.new = len(texts)
        self.seen = len(set(keys)) - self.new
        return [*texts, self._query(encoder, min(detail, Detail.TOKENS), self.goes_on_from(encoder))]

    def read(self, encoder: BiEncoder, detail: Detail, hidden: bool) -> Read:
        raise Missing([self._query(encoder, detail, hidden)])

    def ensure(self, encoder: BiEncoder, cache: VectorCache, texts: Sequence[str], detail: Detail) -> list[bytes]:
        keys, units = self._texts(encoder, cache, texts, detail)
        if units:
            raise Missing(units)
        return keys

    def pairs(self, cross: CrossEncoder, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        lacking = [i for i in positions if i not in self.logit]
        if lacking:
            raise Missing(self._pairs(cross, lacking))
        logits, lengths, cut = zip(*(self.logit[i] for i in positions))
        return _tensor(logits, torch.float32), _tensor(lengths, torch.int64), _tensor(cut, torch.bool)

    def one_way(self, cross: OneWayCrossEncoder, query: Read, positions: Sequence[int], documents: Vectors, states: Sequence[Tensor]) -> Tensor:
        lengths = documents.offsets.diff().cpu()
        lacking = [n for n, i in enumerate(positions) if i not in self.logit]
        if lacking:
            batches = cross.plan(lengths[lacking])
            raise Missing([Batch(self, int(lengths[lacking][b].sum()) + len(b), cross, query, [positions[lacking[n]] for n in b]) for b in batches])
        return _tensor([self.logit[i][0] for i in positions], torch.float32)

    def cached(self, positions: Sequence[int]) -> tuple[Vectors, list[Tensor]]:
        """What a one-way cross-encoder reads of the documents at these positions."""
        assert isinstance(self.cross, OneWayCrossEncoder) and self.cross_cache is not None
        keys = [text_key(self.documents[i], min(self.max_tokens, self.cross.encoder.limit)) for i in positions]
        return self.cross_cache.gather(keys, Detail.TOKENS).to(self.cross.device), self.cross_cache.states(keys)

    def _query(self, encoder: BiEncoder, detail: Detail, hidden: bool) -> Unit:
        (tokens,) = encoder.tokenize([self.query], "query", encoder.limit)
        return Query(self, len(tokens), encoder, tokens, detail, hidden)

    def _texts(self, encoder: BiEncoder, cache: VectorCache, texts: Sequence[str], detail: Detail) -> tuple[list[bytes], list[Unit]]:
        keys = [text_key(text, min(self.max_tokens, encoder.limit)) for text in texts]
        shared = self._shared[id(cache)]
        assert shared is not None
        new = dict.fromkeys(cache.borrow(shared, keys, detail))
        lacking = {key: text for key, text in zip(keys, texts) if key in new} if new else {}
        tokens = encoder.tokenize(list(lacking.values()), "document", self.max_tokens)
        units = [Text(self, len(t), encoder, shared, cache, key, t, detail) for key, t in zip(lacking, tokens)]
        return keys, sorted(units, key=lambda unit: -unit.size)

    def _pairs(self, cross: CrossEncoder, positions: Sequence[int]) -> list[Unit]:
        tokens = cross.tokenize(self.query, [self.documents[i] for i in positions], self.max_tokens)
        return sorted((Pair(self, len(t), cross, t, i) for i, t in zip(positions, tokens)), key=lambda unit: -unit.size)


@dataclass(eq=False)
class Unit:
    """Work that is not divided.

    Attributes:
        pool: whose it is.
        size: tokens, for budgets.
    """

    pool: StepPool
    size: int

    @property
    def group(self) -> Hashable:
        """Units of one group can run together."""
        return id(self)

    def run(self, units: Sequence[Any]) -> None:
        """Runs units of this one's group, itself among them, and leaves the results where their pools look."""
        raise NotImplementedError


@dataclass(eq=False)
class Query(Unit):
    """A query for a bi-encoder."""

    encoder: BiEncoder
    tokens: Tokens
    detail: Detail
    hidden: bool

    @property
    def group(self) -> Hashable:
        return "query", id(self.encoder), self.detail, self.hidden

    def run(self, units: Sequence[Query]) -> None:
        for unit, read in zip(units, self.encoder.read([u.tokens for u in units], detail=self.detail, hidden=self.hidden)):
            unit.pool.has_read(self.encoder, read, self.detail)


@dataclass(eq=False)
class Text(Unit):
    """A document for a bi-encoder, whose vectors go to the shared cache and to the ranking's own."""

    encoder: BiEncoder
    shared: VectorCache
    own: VectorCache
    key: bytes
    tokens: Tokens
    detail: Detail

    @property
    def group(self) -> Hashable:
        return "text", id(self.shared), self.detail

    def run(self, units: Sequence[Text]) -> None:
        new = {unit.key: unit.tokens for unit in units if unit.own.borrow(self.shared, [unit.key], self.detail)}
        if new:  # another ranking may have asked for the same text
            self.shared.add(list(new), self.encoder.encode_tokens(list(new.values()), detail=self.detail), self.detail)
            for unit in units:
                unit.own.borrow(self.shared, [unit.key], self.detail)
            self.shared.trim()


@dataclass(eq=False)
class Pair(Unit):
    """A query with a document for a cross-encoder."""

    cross: CrossEncoder
    tokens: Tokens
    position: int

    @property
    def group(self) -> Hashable:
        return "pair", id(self.cross)

    def run(self, units: Sequence[Pair]) -> None:
        for unit, logit in zip(units, self.cross.logits([u.tokens for u in units]).tolist()):
            unit.pool.logit[unit.position] = logit, unit.size, unit.size < unit.tokens.wanted + self.cross.specials


@dataclass(eq=False)
class Batch(Unit):
    """A query with some documents for a one-way cross-encoder: one forward, since its first layer reads the query once for them all."""

    cross: OneWayCrossEncoder
    query: Read
    positions: list[int]

    def run(self, units: Sequence[Batch]) -> None:
        for unit in units:
            documents, states = unit.pool.cached(unit.positions)
            for position, logit in zip(unit.positions, unit.cross.logits(unit.query, documents, states).tolist()):
                unit.pool.logit[position] = logit, 0, False
