"""A ranking in steps: the same work as Reranker.score, cut so that rankings can share forward passes.

A method is a function of its pool. The pool here never runs a model. If it lacks a vector or a logit, it raises Missing with the
units of work that make it. When these units have run, the method is run again from the start. Scoring again costs much less than
a forward pass, and methods do not notice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rerank_lab.cache.vectors import VectorCache, text_key
from rerank_lab.methods import Pool
from rerank_lab.models.base import Detail, EncodedQuery, Encoder, Scorer, Tokens, WorkItem
from rerank_lab.reranker import Ranking, Reranker


class Missing(Exception):
    """A pool lacks vectors or logits.

    Attributes:
        units: the work that makes them, longest first.
    """

    def __init__(self, units: Sequence[Unit]):
        super().__init__(f"{len(units)} units")
        self.units = units


class Steps:
    """One ranking. Run `units`, in any batches and together with other rankings' units; then `advance`; repeat until it returns a ranking.

    Args:
        reranker: models, method and settings, with caches in memory.
        query, texts: as for Reranker.score. They are tokenised here; any thread may do that.

    Attributes:
        units: the work to do before the next `advance`.

    Raises:
        UserError: as Reranker.score.
    """

    def __init__(self, reranker: Reranker, query: str, texts: Sequence[str]):
        self.reranker, self.pool = reranker, reranker.pool(StepPool, query, texts)
        self.units: Sequence[Unit] = self.pool.first(reranker.method.roles)
        if not self.units:
            self.advance()

    def advance(self) -> Ranking | None:
        """Runs the method. Returns the ranking, or None if more units must run first.

        Raises:
            ModelError: a score is NaN.
        """
        try:
            return self.reranker.finish(self.pool)
        except Missing as missing:
            self.units = missing.units
            return None


class StepPool(Pool):
    """A pool that raises Missing instead of running a model."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.shared = self.caches
        # Vectors that are borrowed from the shared caches stay for as long as this ranking needs them.
        self.caches = {key: VectorCache("") for key in self.shared}
        self.seen = self.new = 0  # distinct documents whose vectors were needed first: in the cache, and not in it
        self.done: dict[int, tuple[float, WorkItem]] = {}  # position → logit, and the work that made it

    def first(self, roles: Sequence[str]) -> Sequence[Unit]:
        """All units that are known to be needed from the start, so that they can share a batch; empty if only the method can tell."""
        encoder = self.encoder if "bi-encoder" in roles else None if self.needs is None else self.needs.encoder
        if encoder is not None and not encoder.pools and not self.full_detail(encoder):
            return []  # stage 1 keeps the documents' own order, and only the method knows how many
        if encoder is None:
            assert self.cross is not None
            return self._scores(self.cross, torch.unique(self._first))
        keys, texts = self._texts(encoder, self.documents, self.full_detail(encoder))
        self.new = len(texts)
        self.seen = len(set(keys)) - self.new
        return [*texts, self._query(encoder, self.query_detail(encoder, self.detail))]

    def encode_query(self, encoder: Encoder, detail: Detail) -> EncodedQuery:
        raise Missing([self._query(encoder, detail)])

    def ensure(self, encoder: Encoder, texts: Sequence[str], detail: Detail) -> list[bytes]:
        keys, units = self._texts(encoder, texts, detail)
        if units:
            raise Missing(units)
        return keys

    def run_scorer(self, cross: Scorer, positions: Tensor) -> Tensor:
        own = positions.tolist()
        lacking = [position not in self.done for position in own]
        if any(lacking):
            raise Missing(self._scores(cross, positions[torch.tensor(lacking, dtype=torch.bool, device="cpu")]))
        logits, work = zip(*(self.done[position] for position in own))
        if cross.needs is None:
            self.note_pairs(positions, work)
        return torch.tensor(logits, dtype=torch.float32, device="cpu")

    def _scores(self, cross: Scorer, positions: Tensor) -> list[Unit]:
        work = self.work(cross, positions)
        self.flops.seen += cross.flops(work)
        places = positions.tolist()
        return sorted((ScoreUnit(self, part.size, cross, part, [places[n] for n in part.positions]) for part in work), key=lambda unit: -unit.size)

    def _query(self, encoder: Encoder, detail: Detail) -> Unit:
        (tokens,) = encoder.tokenize([self.query], "query", encoder.limit)
        return QueryUnit(self, len(tokens), encoder, tokens, detail)

    def _texts(self, encoder: Encoder, texts: Sequence[str], detail: Detail) -> tuple[list[bytes], list[Unit]]:
        keys = [text_key(text, min(self.max_tokens, encoder.limit)) for text in texts]
        shared, own = self.shared[id(encoder)], self.caches[id(encoder)]
        new = dict.fromkeys(own.borrow(shared, keys, detail))
        lacking = {key: text for key, text in zip(keys, texts) if key in new} if new else {}
        tokens = encoder.tokenize(list(lacking.values()), "document", self.max_tokens)
        units = [TextUnit(self, len(t), encoder, shared, own, key, t, detail) for key, t in zip(lacking, tokens)]
        return keys, sorted(units, key=lambda unit: -unit.size)


@dataclass(eq=False)
class Unit:
    """A piece of work that is not divided further.

    Attributes:
        pool: the pool that needs it.
        size: its tokens, for budgets.
    """

    pool: StepPool
    size: int

    @property
    def group(self) -> Hashable:
        """A key; units with the same key can run together."""
        return id(self)

    def run(self, units: Sequence[Any]) -> None:
        """Runs units of this unit's group, including itself, and puts the results where their pools find them."""
        raise NotImplementedError


@dataclass(eq=False)
class QueryUnit(Unit):
    """A query that an encoder reads."""

    encoder: Encoder
    tokens: Tokens
    detail: Detail

    @property
    def group(self) -> Hashable:
        return "query", id(self.encoder), self.detail

    def run(self, units: Sequence[QueryUnit]) -> None:
        for unit, query in zip(units, self.encoder.encode_queries([u.tokens for u in units], detail=self.detail)):
            unit.pool.keep_query(self.encoder, query, self.detail)


@dataclass(eq=False)
class TextUnit(Unit):
    """A document that an encoder reads. Its vectors go to the shared cache and to the ranking's own cache."""

    encoder: Encoder
    shared: VectorCache
    own: VectorCache
    key: bytes
    tokens: Tokens
    detail: Detail

    @property
    def group(self) -> Hashable:
        return "text", id(self.shared), self.detail

    def run(self, units: Sequence[TextUnit]) -> None:
        new = {unit.key: unit.tokens for unit in units if unit.own.borrow(self.shared, [unit.key], self.detail)}
        if new:  # another ranking may have encoded the same text already
            self.shared.add(list(new), self.encoder.encode_tokens(list(new.values()), detail=self.detail), self.detail)
            for unit in units:
                unit.own.borrow(self.shared, [unit.key], self.detail)
            self.shared.trim()


@dataclass(eq=False)
class ScoreUnit(Unit):
    """A part of a scorer's work: the documents at these positions of the pool."""

    cross: Scorer
    work: WorkItem
    positions: list[int]

    @property
    def group(self) -> Hashable:
        return ("score", id(self.cross)) if self.cross.shares else id(self)

    def run(self, units: Sequence[ScoreUnit]) -> None:
        logits = iter(self.cross.logits([unit.work for unit in units]).tolist())
        for unit in units:
            for position in unit.positions:
                unit.pool.done[position] = next(logits), unit.work
