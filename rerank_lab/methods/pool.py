"""A pool: one query, its documents, and the models that look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerank_kernels import similarity_topk, subspace_attention
from rerank_lab.lexical import BM25
from rerank_lab.models.bi_encoder import BiEncoder, Detail, Read, Vectors
from rerank_lab.models.cache import VectorCache, ensure
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.one_way import OneWayCrossEncoder
from rerank_lab.timing import Clock

DROPPED = -torch.inf


@dataclass
class Flops:
    """Counted by formula as the work is done: matrix products only, a multiplication and an addition are two.

    Attributes:
        seen: with the documents' vectors in the cache.
        new: what encoding the documents adds where they are not.
    """

    seen: int = 0
    new: int = 0


class Pool:
    """One query with its n documents. Everything is computed on request, and what is asked for is what is paid for.

    Args:
        query: holds at least one non-blank character.
        documents: n texts; empty and repeated ones are fine.
        encoder, cache: the bi-encoder and its vectors.
        cross: the cross-encoder, if the method uses one.
        cross_cache: vectors of a one-way cross-encoder's backbone; the same as `cache` where that is the bi-encoder.
        detail: all that will be asked of the bi-encoder's vectors of a document, so that it is encoded once.
        max_tokens: own tokens kept of each document.
        clock: where time is booked, by phase.
    """

    def __init__(
        self,
        query: str,
        documents: Sequence[str],
        *,
        encoder: BiEncoder | None = None,
        cache: VectorCache | None = None,
        cross: CrossEncoder | OneWayCrossEncoder | None = None,
        cross_cache: VectorCache | None = None,
        detail: Detail = Detail.POOLED,
        max_tokens: int = 512,
        clock: Clock | None = None,
    ):
        self.query, self.documents, self.max_tokens = query, documents, max_tokens
        self.encoder, self.cache, self.cross, self.cross_cache, self.detail = encoder, cache, cross, cross_cache, detail
        self.clock, self.flops = clock or Clock(), Flops()
        first: dict[str, int] = {}
        self._first = torch.tensor([first.setdefault(text, i) for i, text in enumerate(documents)], dtype=torch.int64, device="cpu")
        self._encoded: dict[int, Tensor] = {}
        self._cut = torch.zeros(len(documents), dtype=torch.bool, device="cpu")
        self._read: dict[int, Read] = {}
        self._tokens = torch.zeros(len(documents), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def truncated(self) -> int:
        """Documents of which some model read only a part."""
        return int(self._cut[self._first].sum())

    @property
    def tokens(self) -> int:
        """Tokens read for the answer, cached or not: the query's and each document's; those of every pair where a cross-encoder reads pairs."""
        return int(self._tokens[self._first].sum()) + sum(int(read.vectors.lengths) for read in self._read.values())

    def vectors(self, positions: Tensor | None = None, *, detail: Detail) -> Vectors:
        """The bi-encoder's vectors of the documents at these positions (all without), from the cache or encoded now."""
        assert self.encoder is not None and self.cache is not None
        return self._vectors(self.encoder, self.cache, positions, detail)[0]

    def _vectors(self, encoder: BiEncoder, cache: VectorCache, positions: Tensor | None, detail: Detail) -> tuple[Vectors, list[Tensor]]:
        first = self._first if positions is None else self._first[positions]
        ahead = max(detail, self.detail) if encoder is self.encoder else detail
        with self.clock.phase("encode"):
            texts = [self.documents[i] for i in first.tolist()]
            keys = self.ensure(encoder, cache, texts, ahead)
            vectors = cache.gather(keys, detail).to(encoder.device)
            states = cache.states(keys) if detail >= Detail.STATES else []
        limit, lengths = min(self.max_tokens, encoder.limit), vectors.lengths.cpu()
        self._cut[first[lengths > limit]] = True
        new = torch.zeros(len(self), dtype=torch.int64, device="cpu")
        new[first] = self._tokens[first] = lengths.clamp(max=limit)
        encoded = self._encoded.setdefault(id(encoder), torch.zeros(len(self), dtype=torch.bool, device="cpu"))
        fresh = torch.zeros_like(encoded)
        fresh[first] = True
        fresh &= ~encoded
        encoded |= fresh
        self.flops.new += encoder.flops(new[fresh], ahead)
        return vectors, states

    def query_vectors(self, *, detail: Detail) -> Vectors:
        """Vectors of the query; never cached, since a query is new to the system that answers it."""
        assert self.encoder is not None
        return self.query_read(self.encoder, detail).vectors

    def query_read(self, encoder: BiEncoder, detail: Detail) -> Read:
        """The query as a bi-encoder sees it, once for all that ask; with its states where a one-way cross-encoder goes on from them."""
        if id(encoder) not in self._read:
            with self.clock.phase("encode"):
                self.has_read(encoder, self.read(encoder, detail, self.goes_on_from(encoder)), detail)
        return self._read[id(encoder)]

    def has_read(self, encoder: BiEncoder, read: Read, detail: Detail) -> None:
        """Keeps what a bi-encoder made of the query."""
        self._read[id(encoder)] = Read(read.vectors.to(encoder.device), read.own, read.start, read.last)
        self.flops.seen += encoder.flops(read.vectors.lengths.cpu(), Detail.TOKENS if self.goes_on_from(encoder) else detail)

    def goes_on_from(self, encoder: BiEncoder) -> bool:
        """Whether a one-way cross-encoder reads the query from this bi-encoder's states."""
        return isinstance(self.cross, OneWayCrossEncoder) and self.cross.encoder is encoder

    def read(self, encoder: BiEncoder, detail: Detail, hidden: bool) -> Read:
        """Runs the bi-encoder over the query."""
        with self.clock.phase("tokenise"):
            tokens = encoder.tokenize([self.query], "query", encoder.limit)
        return encoder.read(tokens, detail=detail, hidden=hidden)[0]

    def ensure(self, encoder: BiEncoder, cache: VectorCache, texts: Sequence[str], detail: Detail) -> list[bytes]:
        """Puts what the cache lacks of the texts there; their keys."""
        return ensure(encoder, cache, texts, max_tokens=self.max_tokens, detail=detail, clock=self.clock)

    def nearest(self, query: Vectors, documents: Vectors, k: int) -> tuple[Tensor, Tensor]:
        """Stage 1: the bi-encoder's own similarity with the query, which is the cosine unless the checkpoint says otherwise.

        Returns:
            similarity of all n documents (fp32) and the positions of the k largest, equal ones in input order.
        """
        with self.clock.phase("score"):
            values, index = self.similarity(query.pooled, documents.pooled)
            cosine = self.unify(torch.empty_like(values[0]).index_copy_(0, index[0], values[0]))
            kept = cosine.sort(descending=True, stable=True).indices[:k]
        self.flops.seen += 2 * documents.pooled.numel()
        return cosine, kept.cpu()

    @property
    def metric(self) -> str:
        """How the bi-encoder compares pooled vectors, as similarity_topk takes it."""
        assert self.encoder is not None
        return self.encoder.similarity

    def similarity(self, query: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity of the query (1 × d) with all n documents (n × d), largest first, and their positions; 1 × n each."""
        return similarity_topk(query, documents, len(self), metric=self.metric)

    def attention(self, query: Vectors, documents: Vectors, tau: float) -> Tensor:
        """What each of the query's Lq tokens finds in each of K documents: A of `best`, K · Lq, document by document."""
        places = torch.arange(len(documents.lengths), dtype=torch.int64, device=documents.offsets.device)
        self.flops.seen += 2 * len(query.tokens) * documents.tokens.numel()
        return self.attend(query, documents, torch.stack([torch.zeros_like(places), places], 1), tau)

    def attend(self, query: Vectors, documents: Vectors, pairs: Tensor, tau: float) -> Tensor:
        """subspace_attention over these pairs (P × 2, int64)."""
        return subspace_attention(query.tokens, query.offsets, documents.tokens, documents.offsets, pairs, tau)

    def logits(self, positions: Tensor) -> Tensor:
        """The cross-encoder's logits of the documents at these positions, each distinct text once."""
        assert self.cross is not None
        own, inverse = torch.unique(self._first[positions], return_inverse=True)
        if isinstance(self.cross, OneWayCrossEncoder):
            assert self.cross_cache is not None
            read = self.query_read(self.cross.encoder, Detail.TOKENS)
            documents, states = self._vectors(self.cross.encoder, self.cross_cache, own, Detail.STATES)
            with self.clock.phase("score"):
                logits = self.one_way(self.cross, read, own.tolist(), documents, states)
            self.flops.seen += self.cross.flops(int(read.vectors.lengths), documents.offsets.diff())
            return logits[inverse]
        with self.clock.phase("score"):
            logits, lengths, cut = self.pairs(self.cross, own.tolist())
        self._cut[own[cut]] = True
        self._tokens[own] = lengths
        self.flops.seen += self.cross.flops(lengths)
        return logits[inverse]

    def one_way(self, cross: OneWayCrossEncoder, query: Read, positions: Sequence[int], documents: Vectors, states: Sequence[Tensor]) -> Tensor:
        """Runs a one-way cross-encoder over the documents at these positions, whose vectors are at hand."""
        return cross.logits(query, documents, states)

    def pairs(self, cross: CrossEncoder, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Runs a cross-encoder over the query with each document: logits, tokens of the pairs, what was cut."""
        with self.clock.phase("tokenise"):
            pairs = cross.tokenize(self.query, [self.documents[i] for i in positions], self.max_tokens)
        return cross.logits(pairs), *cross.lengths(pairs)

    def lexical(self, positions: Tensor) -> Tensor:
        """BM25 with these documents as the whole collection: their own document frequencies and mean length."""
        with self.clock.phase("score"):
            scores = BM25([self.documents[i] for i in positions.tolist()]).scores(self.query)
        return torch.from_numpy(scores)

    def scatter(self, positions: Tensor, scores: Tensor) -> Tensor:
        """Scores of some documents among all n, the others DROPPED."""
        return torch.full((len(self),), DROPPED, dtype=torch.float32, device="cpu").index_copy_(0, positions, scores.float().cpu())

    def unify(self, scores: Tensor) -> Tensor:
        """Gives repeated documents exactly one score: rounding differs by a row's place in a matrix product.

        A repeat that stage 1 dropped stays dropped.
        """
        return torch.where(scores == DROPPED, scores, scores[self._first])
