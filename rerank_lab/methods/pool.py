"""A pool: one query, its documents, and everything that the models can compute of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerank_kernels import similarity_topk, subspace_attention
from rerank_lab.cache.vectors import VectorCache, ensure
from rerank_lab.first_stage.lexical import BM25
from rerank_lab.methods.spread import Spread
from rerank_lab.models.base import Detail, EncodedQuery, Encoder, Inputs, Scorer, Vectors, WorkItem
from rerank_lab.timing import Clock

DROPPED = -torch.inf


@dataclass
class Flops:
    """FLOPs of one ranking, counted by formula: matrix products only, a multiplication and an addition count as two.

    Attributes:
        seen: if all documents' vectors are in the cache.
        new: what encoding the documents adds if none are.
    """

    seen: int = 0
    new: int = 0


class Pool:
    """One query with its n documents. Nothing is computed before a method asks for it.

    Args:
        query: with at least one non-blank character.
        documents: n texts; empty and repeated ones are allowed.
        encoder: makes vectors; None: no bi-encoder.
        cross: scores pairs; None: no cross-encoder.
        caches: id() of an encoder → the cache of its vectors.
        detail: the most detailed vectors of a document that the method will ask for. If `cross` needs more, documents are
            encoded in that detail at once, so that each is encoded only once.
        max_tokens: tokens kept of each document, special ones not counted.
        spread: of the encoder's token similarities; None: the method needs none.
        clock: measures the phases.

    Attributes:
        flops: of all that was computed so far.
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
        spread: Spread | None = None,
        clock: Clock | None = None,
    ):
        self.query, self.documents, self.max_tokens, self.spread = query, documents, max_tokens, spread
        self.encoder, self.cross, self.caches, self.detail = encoder, cross, caches or {}, detail
        self.needs = None if cross is None else cross.needs
        self.clock, self.flops = clock or Clock(), Flops()
        first: dict[str, int] = {}
        self._first = torch.tensor([first.setdefault(text, i) for i, text in enumerate(documents)], dtype=torch.int64, device="cpu")
        self._encoded: dict[int, Tensor] = {}
        self._cut = torch.zeros(len(documents), dtype=torch.bool, device="cpu")
        self._queries: dict[int, EncodedQuery] = {}
        self._tokens = torch.zeros(len(documents), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def truncated(self) -> int:
        """The number of documents that were cut for at least one model."""
        return int(self._cut[self._first].sum())

    @property
    def tokens(self) -> int:
        """Tokens read so far, whether vectors were cached or not: those of the query and of each document.

        If a cross-encoder reads pairs, a document counts with all tokens of its pair.
        """
        return int(self._tokens[self._first].sum()) + sum(int(query.vectors.lengths) for query in self._queries.values())

    def vectors(self, positions: Tensor | None = None, *, detail: Detail) -> Vectors:
        """The encoder's vectors of documents, from the cache or encoded now.

        Args:
            positions: k positions, int64; None: all documents.
            detail: how much of each document is wanted.
        """
        assert self.encoder is not None
        return self._vectors(self.encoder, positions, detail)[0]

    def _vectors(self, encoder: Encoder, positions: Tensor | None, detail: Detail) -> tuple[Vectors, list[Tensor]]:
        first = self._first if positions is None else self._first[positions]
        full_detail, cache = max(detail, self.full_detail(encoder)), self.caches[id(encoder)]
        with self.clock.phase("encode"):
            texts = [self.documents[i] for i in first.tolist()]
            keys = self.ensure(encoder, texts, full_detail)
            vectors = cache.gather(keys, detail).to(encoder.device)
            states = cache.states(keys) if detail >= Detail.STATES else []
        limit, lengths = min(self.max_tokens, encoder.limit), vectors.lengths.cpu()
        self._cut[first[lengths > limit]] = True
        new = torch.zeros(len(self), dtype=torch.int64, device="cpu")
        new[first] = lengths.clamp(max=limit)
        self._tokens[first] = torch.maximum(self._tokens[first], new[first])  # several encoders may read a document, in any order
        encoded = self._encoded.setdefault(id(encoder), torch.zeros(len(self), dtype=torch.bool, device="cpu"))
        fresh = torch.zeros_like(encoded)
        fresh[first] = True
        fresh &= ~encoded
        encoded |= fresh
        self.flops.new += encoder.flops(new[fresh], full_detail)
        return vectors, states

    def full_detail(self, encoder: Encoder) -> Detail:
        """The most detailed vectors of a document that will be asked of this encoder."""
        needed = self.needs.detail if self.needs is not None and self.needs.encoder is encoder else Detail.POOLED
        return max(self.detail, needed) if encoder is self.encoder else needed

    def query_vectors(self, *, detail: Detail) -> Vectors:
        """Vectors of the query (N = 1). They are never cached: each query is taken to be new."""
        assert self.encoder is not None
        return self.encoded_query(self.encoder, detail).vectors

    def encoded_query(self, encoder: Encoder, detail: Detail) -> EncodedQuery:
        """The encoded query. It is encoded on the first call and then kept. It has states if the scorer needs them from this encoder."""
        if id(encoder) not in self._queries:
            with self.clock.phase("encode"):
                self.keep_query(encoder, self.encode_query(encoder, self.query_detail(encoder, detail)), detail)
        return self._queries[id(encoder)]

    def keep_query(self, encoder: Encoder, query: EncodedQuery, detail: Detail) -> None:
        """Keeps an encoded query, and counts the FLOPs of encoding it in this detail."""
        self._queries[id(encoder)] = EncodedQuery(query.vectors.to(encoder.device), query.own, query.start, query.last)
        read = torch.tensor([len(query.own) - encoder.specials], dtype=torch.int64, device="cpu")
        self.flops.seen += encoder.flops(read, self.query_detail(encoder, detail))

    def query_detail(self, encoder: Encoder, detail: Detail) -> Detail:
        """The detail in which to encode the query if the method asks for `detail` first: enough for all that will be asked of this encoder.

        So a query is encoded alike whichever part of the method asks first. States are made only if the scorer needs them.
        """
        return max(min(detail, Detail.TOKENS), self.full_detail(encoder))

    def encode_query(self, encoder: Encoder, detail: Detail) -> EncodedQuery:
        """Runs an encoder on the query."""
        with self.clock.phase("tokenise"):
            tokens = encoder.tokenize([self.query], "query", encoder.limit)
        return encoder.encode_queries(tokens, detail=detail)[0]

    def ensure(self, encoder: Encoder, texts: Sequence[str], detail: Detail) -> list[bytes]:
        """Encodes those texts that the cache lacks in this detail. Returns the cache's key of each text."""
        return ensure(encoder, self.caches[id(encoder)], texts, max_tokens=self.max_tokens, detail=detail, clock=self.clock)

    def stage1(self, k: int) -> tuple[Tensor, Tensor]:
        """The k documents that stage 1 keeps: by the bi-encoder's similarity, or, if it makes no pooled vectors, the first k as they came in.

        Returns:
            similarity of all n documents (n, fp32; zeros if there is none), and the positions of the k kept (k, int64, on the CPU).
        """
        assert self.encoder is not None
        if self.encoder.pools:
            return self.nearest(self.query_vectors(detail=Detail.POOLED), self.vectors(detail=Detail.POOLED), k)
        kept = torch.arange(min(k, len(self)), dtype=torch.int64, device="cpu")
        return torch.zeros(len(self), dtype=torch.float32, device=self.encoder.device), kept

    def nearest(self, query: Vectors, documents: Vectors, k: int) -> tuple[Tensor, Tensor]:
        """Stage 1: compares the query with all documents by the bi-encoder's similarity, the cosine unless its checkpoint says otherwise.

        Returns:
            similarity of all n documents (n, fp32), and the positions of the k largest (k, int64, on the CPU). Equal ones are
            in input order.
        """
        with self.clock.phase("score"):
            values, index = self.similarity(query.pooled, documents.pooled)
            cosine = self.unify(torch.empty_like(values[0]).index_copy_(0, index[0], values[0]))
            kept = cosine.sort(descending=True, stable=True).indices[:k]
        self.flops.seen += 2 * documents.pooled.numel()
        return cosine, kept.cpu()

    @property
    def metric(self) -> str:
        """How the bi-encoder compares pooled vectors: "cosine" or "dot"."""
        assert self.encoder is not None
        return self.encoder.similarity

    def similarity(self, query: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities of the query (1 × d) with all n documents (n × d), largest first, and the documents' positions; 1 × n each."""
        return similarity_topk(query, documents, len(self), metric=self.metric)

    def attention(self, query: Vectors, documents: Vectors, tau: float) -> Tensor:
        """Subspace attention of each of the query's Lq tokens over each of K documents: A of `best`, flat, K · Lq, document by document."""
        places = torch.arange(len(documents.lengths), dtype=torch.int64, device=documents.offsets.device)
        self.flops.seen += 2 * len(query.tokens) * documents.tokens.numel()
        return self.attend(query, documents, torch.stack([torch.zeros_like(places), places], 1), tau)

    def attend(self, query: Vectors, documents: Vectors, pairs: Tensor, tau: float) -> Tensor:
        """The operator subspace_attention on these pairs of (query, document) positions (P × 2, int64)."""
        return subspace_attention(query.tokens, query.offsets, documents.tokens, documents.offsets, pairs, tau)

    def logits(self, positions: Tensor) -> Tensor:
        """The scorer's logits of the documents at these k positions (k, fp32, on the CPU). Repeated texts are scored once."""
        assert self.cross is not None
        own, inverse = torch.unique(self._first[positions], return_inverse=True)
        return self.run_scorer(self.cross, own)[inverse]

    def run_scorer(self, cross: Scorer, positions: Tensor) -> Tensor:
        """Runs a scorer on the documents at these k distinct positions; logits (k, fp32, on the CPU)."""
        work = self.work(cross, positions)
        with self.clock.phase("score"):
            found = cross.logits(work)
        self.flops.seen += cross.flops(work)
        places = torch.tensor([place for part in work for place in part.positions], dtype=torch.int64, device="cpu")
        if cross.needs is None:
            self.note_pairs(positions[places], [part for part in work for _ in part.positions])
        return torch.empty_like(found).index_copy_(0, places, found)

    def work(self, cross: Scorer, positions: Tensor) -> Sequence[WorkItem]:
        """The scorer's work items for the documents at these positions. Vectors that the scorer needs are made first."""
        texts = [self.documents[i] for i in positions.tolist()]
        if cross.needs is None:
            with self.clock.phase("tokenise"):
                return cross.work(Inputs(self.query, texts, self.max_tokens))
        query = self.encoded_query(cross.needs.encoder, cross.needs.detail)
        vectors, states = self._vectors(cross.needs.encoder, positions, cross.needs.detail)
        with self.clock.phase("score"):
            return cross.work(Inputs(self.query, texts, self.max_tokens, query, vectors, states))

    def note_pairs(self, positions: Tensor, work: Sequence[WorkItem]) -> None:
        """Records tokens and truncation for a scorer that reads pairs. (For a scorer that reads vectors, `_vectors` records them.)

        Args:
            positions: k positions of documents.
            work: the work item of each of them.
        """
        first = {id(part): n for n, part in reversed(list(enumerate(work)))}
        sizes = [part.size if first[id(part)] == n else 0 for n, part in enumerate(work)]  # an item that scores several documents counts once
        self._tokens[positions] = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        self._cut[positions[torch.tensor([part.cut for part in work], dtype=torch.bool, device="cpu")]] = True

    def lexical(self, positions: Tensor) -> Tensor:
        """BM25 scores of the documents at these k positions (k, fp32). Document frequencies and mean length are those of these k documents."""
        with self.clock.phase("score"):
            scores = BM25([self.documents[i] for i in positions.tolist()]).scores(self.query)
        return torch.from_numpy(scores)

    def scatter(self, positions: Tensor, scores: Tensor) -> Tensor:
        """Puts the scores of k documents at their positions among all n; the others are DROPPED."""
        return torch.full((len(self),), DROPPED, dtype=torch.float32, device="cpu").index_copy_(0, positions, scores.float().cpu())

    def unify(self, scores: Tensor) -> Tensor:
        """Gives repeated documents the score of their first occurrence: rounding depends on a row's position in a matrix product.

        A repeat that stage 1 dropped stays dropped.
        """
        return torch.where(scores == DROPPED, scores, scores[self._first])
