"""longest: a first stage as anybody may write one, in one file: the longest documents that hold a word."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rerank_lab.datasets.runs import Ranked, Run, order
from rerank_lab.files import Json
from rerank_lab.first_stage import Context, Declared


class Longest:
    """The longest documents that hold a word, whatever the query.

    Args:
        context: the collection.
        argument: the word.
    """

    def __init__(self, context: Context, argument: str):
        self.corpus, self.word, self.notes = context.dataset.corpus, argument, list[str]()

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """As FirstStage.search."""
        ids = [i for i, text in self.corpus.items() if self.word in text]
        lengths = np.array([len(self.corpus[i]) for i in ids], dtype=np.float32)
        best = order(lengths)[:k]
        self.notes.append(f"{len(self.corpus) - len(ids)} documents lack the word {self.word}")
        return {query: Ranked([ids[i] for i in best], lengths[best]) for query in queries}

    def about(self) -> dict[str, Json]:
        """As FirstStage.about."""
        return {"word": self.word}


DECLARED = Declared("longest", "WORD", "the longest that hold WORD", f"{__name__}:Longest")
