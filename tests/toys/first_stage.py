"""longest: an example of a new first stage in one file. It finds the longest documents that hold a word."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rerank_lab.datasets.runs import Ranked, Run, order
from rerank_lab.files import Json
from rerank_lab.first_stage import Context, FirstStageKind


class Longest:
    """The longest documents that hold a word, for every query the same.

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


KIND = FirstStageKind("longest", "WORD", "the longest that hold WORD", f"{__name__}:Longest")
