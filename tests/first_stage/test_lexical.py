"""BM25 for queries without a word of two letters and for scripts without spaces. All other queries get the scores of bm25s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bm25s
import numpy as np
import pytest
import Stemmer

from rerank_lab import Reranker
from rerank_lab.datasets import load_dataset
from rerank_lab.first_stage.lexical import BM25, PARAMETERS, TOKENIZERS
from rerank_lab.methods.best import Best
from tests.first_stage.test_candidates import find

DOCUMENTS = [
    "The C programming language, and many other words",
    "C++ templates are hard in practice",
    "C# and R for statistics",
    "Rust is no such thing",
    "今天天氣很好，我們去公園",
    "水是生命之源",
    "喝水有益健康 and English words",
    "ภาษาไทยไม่มีช่องว่าง",
    "日本語のテキストを検索する",
    "검색 엔진은 문서를 찾는다",
    "यह हिन्दी में है",
    "हमें नींद न आई",
    "",
]


def found(query: str, documents: list[str] = DOCUMENTS) -> list[int]:
    scores = BM25(documents).scores(query)
    assert scores.shape == (len(documents),) and scores.dtype == np.float32
    return [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0]


@pytest.mark.parametrize(
    ("query", "best", "all_found"),
    [
        ("C", {0, 1, 2}, {0, 1, 2}),
        ("C++", {1}, {0, 1, 2}),
        ("c#", {2}, {0, 1, 2}),
        ("the R", {2}, {2}),
        ("天氣", {4}, {4}),
        ("公園", {4}, {4}),
        ("水", {5, 6}, {5, 6}),
        ("健康", {6}, {6}),
        ("健康 words", {6}, {0, 6}),
        ("ไทย", {7}, {7}),
        ("テキスト", {8}, {8}),
        ("検索", {8}, {8}),
        ("검색", {9}, {9}),
        ("हिन्दी", {10}, {10}),
    ],
)
def test_words_that_matched_nothing_are_found(query: str, best: set[int], all_found: set[int]) -> None:
    ranked = found(query)
    assert set(ranked) == all_found and set(ranked[: len(best)]) == best


@pytest.mark.parametrize("query", ["", "the", "a", "a the", "?!", "+", "_", "Z", "5", "龍"])
@pytest.mark.parametrize("documents", [DOCUMENTS, [], [""], ["the and of"], ["水"], ["C"]], ids=range(6))
def test_what_no_document_holds_matches_none(query: str, documents: list[str]) -> None:
    assert found(query, documents) == []


def test_a_query_with_words_gets_the_bits_of_bm25s_whatever_was_asked_before() -> None:
    data, stemmer = load_dataset("numpydoc"), Stemmer.Stemmer("english")
    documents = [*list(data.corpus.values())[:100], *DOCUMENTS]
    plain = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    plain.index(bm25s.tokenize(documents, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    index = BM25(documents)
    queries = [*list(data.queries.values())[:40], "C language", "rust and R", "naïve Straße", "поиск слов", "검색 엔진", "भारत में"]
    for odd in (None, "C", "水"):
        if odd:
            assert index.scores(odd).any()
        for query in queries:
            terms = bm25s.tokenize([query], stopwords="en", stemmer=stemmer, show_progress=False, return_ids=False)[0]
            assert index.tokenizer(query) == "words"
            assert index.scores(query).tobytes() == np.asarray(plain.get_scores(terms), dtype=np.float32).tobytes(), query


def test_the_lexical_term_of_best_finds_letters_too(reranker: Reranker) -> None:
    texts = ["The C language", "C", "no such letter", "in Rust"]
    lexical, none = (reranker.using(Best(lexical=weight)).score("the c++", [*texts, "with C++ or C"]).order for weight in (50, 0))
    assert lexical[0] == 4 and set(lexical[1:3]) == {0, 1} and lexical != none


def test_results_name_the_tokenizers_that_ran(beir: Callable[..., Path]) -> None:
    texts = {f"d{i}": ("", text) for i, text in enumerate(DOCUMENTS)}
    queries = {"q1": "C++", "q2": "天氣", "q3": "rust", "q4": "the", "q5": "公園"}
    qrels = {q: {"d0": 1} for q in queries}
    made = find(beir(documents=texts, queries=queries, qrels=qrels), "bm25")
    assert {q: r.documents[0] for q, r in made.run.items()} == {"q1": "d1", "q2": "d4", "q3": "d3", "q5": "d4"}
    said = "words of two letters and more; single letters and words with marks for 1 of 5 queries; character bigrams and words for 2 of 5 queries"
    assert made.details["parameters"] == PARAMETERS | {"tokenizer": said}
    ordinary = find(beir("other", documents=texts, queries={"q3": "rust"}, qrels={"q3": {"d0": 1}}), "bm25")
    assert ordinary.details["parameters"] == PARAMETERS and PARAMETERS["tokenizer"] == TOKENIZERS["words"]
