"""A pool: one query, its documents, and the models that look at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerank_kernels import similarity_topk, subspace_attention
from rerank_lab.cache.vectors import VectorCache, ensure
from rerank_lab.first_stage.lexical import BM25
from rerank_lab.models.base import Detail, Encoder, Inputs, Read, Scorer, Vectors, Work
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
        encoder: makes vectors, if the method uses them.
        cross: scores pairs, if the method uses it.
        caches: of vectors, by id() of the encoder that makes them.
        detail: all that the method will ask of the encoder's vectors of a document; what `cross` needs is added, so that each is encoded once.
        max_tokens: own tokens kept of each document.
        clock: where time is booked, by phase.
    """

    def __init__(
        self,
        query: str,
        documents: Sequence[str],
        *,
        encoder: Encoder | None = None,
        cross: Scorer | None = None,
        caches: Mapping[int, VectorCache] | None = None,
        detail: Detail = Detail.POOLED,
        max_tokens: int = 512,
        clock: Clock | None = None,
    ):
        self.query, self.documents, self.max_tokens = query, documents, max_tokens
        self.encoder, self.cross, self.caches, self.detail = encoder, cross, caches or {}, detail
        self.needs = None if cross is None else cross.needs
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
        """The encoder's vectors of the documents at these positions (all without), from the cache or encoded now."""
        assert self.encoder is not None
        return self._vectors(self.encoder, positions, detail)[0]

    def _vectors(self, encoder: Encoder, positions: Tensor | None, detail: Detail) -> tuple[Vectors, list[Tensor]]:
        first = self._first if positions is None else self._first[positions]
        ahead, cache = max(detail, self.ahead(encoder)), self.caches[id(encoder)]
        with self.clock.phase("encode"):
            texts = [self.documents[i] for i in first.tolist()]
            keys = self.ensure(encoder, texts, ahead)
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

    def ahead(self, encoder: Encoder) -> Detail:
        """All that will be asked of an encoder's vectors of a document."""
        needed = self.needs.detail if self.needs is not None and self.needs.encoder is encoder else Detail.POOLED
        return max(self.detail, needed) if encoder is self.encoder else needed

    def query_vectors(self, *, detail: Detail) -> Vectors:
        """Vectors of the query; never cached, since a query is new to the system that answers it."""
        assert self.encoder is not None
        return self.query_read(self.encoder, detail).vectors

    def query_read(self, encoder: Encoder, detail: Detail) -> Read:
        """The query as an encoder sees it, once for all that ask; with its states where a scorer goes on from them."""
        if id(encoder) not in self._read:
            with self.clock.phase("encode"):
                self.has_read(encoder, self.read(encoder, self.query_detail(encoder, detail)), detail)
        return self._read[id(encoder)]

    def has_read(self, encoder: Encoder, read: Read, detail: Detail) -> None:
        """Keeps what an encoder made of the query."""
        self._read[id(encoder)] = Read(read.vectors.to(encoder.device), read.own, read.start, read.last)
        self.flops.seen += encoder.flops(read.vectors.lengths.cpu(), self.query_detail(encoder, detail))

    def query_detail(self, encoder: Encoder, detail: Detail) -> Detail:
        """What is made of the query at once where the method asks for this; states only where a scorer goes on from them."""
        own = min(detail, Detail.TOKENS)
        return max(own, self.needs.detail) if self.needs is not None and self.needs.encoder is encoder else own

    def read(self, encoder: Encoder, detail: Detail) -> Read:
        """Runs an encoder over the query."""
        with self.clock.phase("tokenise"):
            tokens = encoder.tokenize([self.query], "query", encoder.limit)
        return encoder.read(tokens, detail=detail)[0]

    def ensure(self, encoder: Encoder, texts: Sequence[str], detail: Detail) -> list[bytes]:
        """Puts what the cache lacks of the texts there; their keys."""
        return ensure(encoder, self.caches[id(encoder)], texts, max_tokens=self.max_tokens, detail=detail, clock=self.clock)

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
        """The scorer's logits of the documents at these positions, each distinct text once."""
        assert self.cross is not None
        own, inverse = torch.unique(self._first[positions], return_inverse=True)
        return self.scored(self.cross, own)[inverse]

    def scored(self, cross: Scorer, positions: Tensor) -> Tensor:
        """Runs a scorer over the documents at these distinct positions."""
        work = self.work(cross, positions)
        with self.clock.phase("score"):
            found = cross.logits(work)
        self.flops.seen += cross.flops(work)
        places = torch.tensor([place for part in work for place in part.positions], dtype=torch.int64, device="cpu")
        if cross.needs is None:
            self.has_paired(positions[places], [part for part in work for _ in part.positions])
        return torch.empty_like(found).index_copy_(0, places, found)

    def work(self, cross: Scorer, positions: Tensor) -> Sequence[Work]:
        """What there is to do for a scorer at these positions, with whatever it needs made first."""
        texts = [self.documents[i] for i in positions.tolist()]
        if cross.needs is None:
            with self.clock.phase("tokenise"):
                return cross.work(Inputs(self.query, texts, self.max_tokens))
        read = self.query_read(cross.needs.encoder, Detail.TOKENS)
        vectors, states = self._vectors(cross.needs.encoder, positions, cross.needs.detail)
        with self.clock.phase("score"):
            return cross.work(Inputs(self.query, texts, self.max_tokens, read, vectors, states))

    def has_paired(self, positions: Tensor, work: Sequence[Work]) -> None:
        """Notes what a scorer of pairs has read for each of these positions; of scorers that read vectors, `_vectors` does."""
        self._tokens[positions] = torch.tensor([part.size for part in work], dtype=torch.int64, device="cpu")
        self._cut[positions[torch.tensor([part.cut for part in work], dtype=torch.bool, device="cpu")]] = True

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
