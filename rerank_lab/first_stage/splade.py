"""Candidates by a sparse encoder (SPLADE): the dot product of the weights that a query and a document give to words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rerank_lab.datasets.corpus import digests
from rerank_lab.datasets.runs import Ranked, Run, order
from rerank_lab.files import Json
from rerank_lab.first_stage.base import QUERY_BATCH, Context
from rerank_lab.models.base import SparseVectors
from rerank_lab.models.kinds import load_sparse_encoder

BLOCK = 256  # documents that are encoded between two steps of the progress bar


class SpladeStage:
    """Documents that share a word with the query, by a sparse encoder's dot product. Equal scores are in corpus order.

    The model runs in this process, also where the rest of an evaluation runs on a cluster. Its vectors are not kept.

    Raises:
        UserError: the model is not found, or is no sparse encoder.
    """

    def __init__(self, context: Context, argument: str):
        self.context, self.model = context, load_sparse_encoder(argument, device=context.device)
        self.notes = [f"{argument}: {note}" for note in self.model.checkpoint.notes]
        self.nonzeros = {"query": 0.0, "document": 0.0}

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """As FirstStage.search."""
        corpus, run = self.context.dataset.corpus, Run()
        ids, texts = list(corpus), list(corpus.values())
        # Each distinct text is encoded once: rounding depends on a text's batch, and equal texts must tie.
        groups: dict[bytes | str, int] = {}
        places = np.array([groups.setdefault(text, len(groups)) for text in digests(corpus)], dtype=np.int64)
        first = np.unique(places, return_index=True)[1]
        index = Index(self._encode([texts[i] for i in first], "document", BLOCK))
        asked = self._encode(list(queries.values()), "query", QUERY_BATCH)
        for n, query in enumerate(self.context.progress(queries, "splade: search")):
            own = slice(asked.ends[n], asked.ends[n + 1])
            scores = index.scores(asked.words[own], asked.weights[own])[places].astype(np.float32)
            best = order(scores)[:k]
            best = best[scores[best] > 0]
            run[query] = Ranked([ids[i] for i in best], scores[best])
        return run

    def _encode(self, texts: Sequence[str], kind: str, block: int) -> SparseVectors:
        """Vectors of texts of a kind. Texts of about one length share their batches."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        starts = self.context.progress(range(0, len(texts), block), f"splade: encode {kind}s")
        found = SparseVectors.join(self.model.encode([texts[i] for i in order[start : start + block]], kind) for start in starts)
        self.nonzeros[kind] = len(found.words) / max(1, len(found))
        return found.taken(np.argsort(order))

    def about(self) -> dict[str, Json]:
        """As FirstStage.about."""
        reading = self.model.checkpoint.reading()
        facts: dict[str, Json] = {
            "model": self.model.name, "model_files": self.model.fingerprint, "token_limit": self.model.limit,
            "nonzeros_per_query": round(self.nonzeros["query"], 1), "nonzeros_per_document": round(self.nonzeros["document"], 1),
        }  # fmt: skip
        return facts | ({"model_reading": reading} if reading else {})


class Index:
    """Documents by word.

    Args:
        documents: the vectors of N texts.
    """

    def __init__(self, documents: SparseVectors):
        self.count = len(documents)
        by_word = np.argsort(documents.words, kind="stable")
        self.documents = np.repeat(np.arange(self.count, dtype=np.int32), np.diff(documents.ends))[by_word]
        self.weights, words = documents.weights[by_word], documents.words[by_word]
        self.starts = np.searchsorted(words, np.arange((int(words[-1]) if len(words) else 0) + 2))

    def scores(self, words: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The dot product with every document: N, fp64, 0 if they share no word.

        Args:
            words, weights: of a query, as SparseVectors has them.
        """
        found = np.zeros(self.count, dtype=np.float64)
        for word, weight in zip(words.tolist(), weights.tolist()):
            if word + 1 < len(self.starts):
                own = slice(self.starts[word], self.starts[word + 1])
                found[self.documents[own]] += weight * self.weights[own].astype(np.float64)
        return found
