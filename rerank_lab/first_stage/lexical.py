"""BM25 by bm25s, with the project's one set of parameters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

WORDS, LETTERS, BIGRAMS = "words", "letters", "bigrams"
TOKENIZERS = {WORDS: "words of two letters and more", LETTERS: "single letters and words with marks", BIGRAMS: "character bigrams and words"}
PARAMETERS = {"library": "bm25s", "method": "lucene", "k1": 1.2, "b": 0.75, "stopwords": "en", "stemmer": "snowball english", "tokenizer": TOKENIZERS[WORDS]}
INDEX_BLOCK = 1024  # documents whose terms are held as strings at once
# Thai, Lao, Myanmar, Khmer; Japanese marks, Hiragana and Katakana with their extensions, Bopomofo; Han; half-width Katakana.
SPACELESS = re.compile(
    "[\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u1000-\u103f\u1050-\u109f\uaa60-\uaa7f\u1780-\u17d3"
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]+"
)
# Vowel signs and accents. bm25s's pattern splits words at them, which leaves single letters of Hindi and other Indic text.
MARKS = "".join(chr(c) for c in range(0x300, 0xFE30) if unicodedata.category(chr(c)).startswith("M"))
MARKED = re.compile(rf"[\w{MARKS}]+")
WORD = re.compile(r"\w+")
SIGNED = re.compile(r"(?<!\w)[^\W_][+#]+")  # C++, C#


class BM25:
    """A BM25 index over N documents.

    There are two indexes. The first holds bm25s's own words, of two letters or more. The second also holds single letters,
    words with marks, and, for scripts without spaces (Chinese, Thai …), characters and character bigrams. It answers
    queries in such scripts, and queries without a word of two letters (C, C++). It is built when the first such query
    comes. All other queries are answered by the first index.

    Args:
        documents: N texts.
        progress: whether to show bm25s's progress bars.
    """

    def __init__(self, documents: Sequence[str], progress: bool = False):
        import Stemmer

        self.progress = progress
        self.stemmer, self.documents, self.count = Stemmer.Stemmer("english"), documents, len(documents)
        tokens = self._tokens(documents, progress)
        self.index = None if not tokens.vocab else _index(tokens, progress)

    def tokenizer(self, query: str) -> str:
        """How a query is split into terms: "words", "letters" or "bigrams", the keys of TOKENIZERS."""
        return self._asked(query)[0]

    def scores(self, query: str) -> np.ndarray:
        """The BM25 score of every document: N, fp32, 0 if no term matches."""
        kind, terms = self._asked(query)
        index = None if not terms else self.index if kind == WORDS else self._wide
        return np.zeros(self.count, dtype=np.float32) if index is None else np.asarray(index.get_scores(terms), dtype=np.float32)

    def _asked(self, query: str) -> tuple[str, list[str]]:
        if SPACELESS.search(query):
            return BIGRAMS, self._wide_terms([query], asked=True)[0]
        words = self._words([query])[0]
        letters = [] if words else _letters(query)
        return (LETTERS, letters) if letters else (WORDS, words)

    @cached_property
    def _wide(self) -> Any:
        from bm25s.tokenization import Tokenized

        numbers: dict[str, int] = {}  # term → its id, so that terms are kept as numbers and not as strings
        ids: list[list[int]] = []
        for start in range(0, self.count, INDEX_BLOCK):
            for terms in self._wide_terms(self.documents[start : start + INDEX_BLOCK]):
                ids.append([numbers.setdefault(term, len(numbers)) for term in terms])
        return _index(Tokenized(ids, numbers), self.progress) if numbers else None

    def _wide_terms(self, texts: Sequence[str], asked: bool = False) -> list[list[str]]:
        """The terms of the second index for each text. A stretch of a script without spaces gives its bigrams.

        Args:
            texts: documents or queries.
            asked: whether they are queries. A document also gives single characters; a query does so only for a stretch of one character.
        """
        spaced = [SPACELESS.sub(" ", text) for text in texts]
        found = self._words(spaced)
        for terms, text, rest in zip(found, texts, spaced):
            terms += _letters(rest)
            for run in SPACELESS.findall(text):
                terms += [run[i : i + 2] for i in range(len(run) - 1)]
                terms += [] if asked and len(run) > 1 else run
        return found

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return list(self._tokens(texts, False, words=True))

    def _tokens(self, texts: Sequence[str], progress: bool, words: bool = False) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", stemmer=self.stemmer, show_progress=progress, return_ids=not words)


def _index(tokens: Any, progress: bool) -> Any:
    import bm25s

    index = bm25s.BM25(method="lucene", k1=PARAMETERS["k1"], b=PARAMETERS["b"])
    index.index(tokens, show_progress=progress)
    return index


def _letters(text: str) -> list[str]:
    """Terms that bm25s's pattern of words misses: single letters and digits that are no stop words, words with marks, and letters with signs (c++)."""
    import bm25s

    text, stop = text.lower(), bm25s.stopwords.STOPWORDS_EN
    kept = [one for one in MARKED.findall(text) if (len(one) == 1 or not WORD.fullmatch(one)) and any(map(str.isalnum, one)) and one not in stop]
    return kept + SIGNED.findall(text)
