"""BM25 as bm25s computes it, with the one set of parameters that the project uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PARAMETERS = {"library": "bm25s", "method": "lucene", "k1": 1.2, "b": 0.75, "stopwords": "en", "stemmer": "snowball english"}


class BM25:
    """An index over N documents.

    Args:
        documents: their texts.
        progress: whether to draw bm25s's own progress bars.
    """

    def __init__(self, documents: Sequence[str], progress: bool = False):
        import bm25s
        import Stemmer

        self.stemmer, self.count = Stemmer.Stemmer("english"), len(documents)
        self.index: Any = bm25s.BM25(method="lucene", k1=PARAMETERS["k1"], b=PARAMETERS["b"])
        tokens = self._tokens(documents, progress)
        self.empty = not tokens.vocab
        if not self.empty:
            self.index.index(tokens, show_progress=progress)

    def scores(self, query: str) -> np.ndarray:
        """Of every document, fp32, 0 where no term matches."""
        terms = [] if self.empty else self._tokens([query], False, words=True)[0]
        if not terms:
            return np.zeros(self.count, dtype=np.float32)
        return np.asarray(self.index.get_scores(terms), dtype=np.float32)

    def _tokens(self, texts: Sequence[str], progress: bool, words: bool = False) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", stemmer=self.stemmer, show_progress=progress, return_ids=not words)
