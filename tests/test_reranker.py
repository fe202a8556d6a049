"""Reranker and rerank(): arguments and results, with the real model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rerank_lab
from rerank_lab import Reranker, rerank
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import Detail
from rerank_lab.models.bi_encoder import BiEncoder
from tests.conftest import DOCUMENTS
from tests.models.checkpoints import bi_encoder

TEXTS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
QUERY = "zeros of a polynomial"


@pytest.mark.parametrize("method", ["fast", "best"])
def test_the_right_document_comes_first(reranker: Reranker, method: str) -> None:
    results = reranker.using(method).rank(QUERY, TEXTS, top_n=2)
    assert len(results) == 2 and results[0].index == 4 and results[0].document == TEXTS[4]
    assert results[0].relevance_score > results[1].relevance_score


def test_documents_may_be_objects_and_come_back_as_sent(reranker: Reranker) -> None:
    sent: list[Any] = [{"text": text, "n": i} for i, text in enumerate(TEXTS[:3])] + TEXTS[3:]
    results = reranker.rank(QUERY, sent)
    assert [r.index for r in results] == [r.index for r in reranker.rank(QUERY, TEXTS)]
    assert all(r.document is sent[r.index] for r in results)


@pytest.mark.parametrize("method", ["fast", "best"])
@pytest.mark.parametrize("copies", [2, 7])
def test_repeated_documents_score_exactly_alike_in_input_order(reranker: Reranker, method: str, copies: int) -> None:
    results = reranker.using(method).rank(QUERY, TEXTS * copies)
    for text in TEXTS:
        same = [r for r in results if r.document == text]
        assert len({r.relevance_score for r in same}) == 1
        assert [r.index for r in same] == sorted(r.index for r in same)


@pytest.mark.parametrize("method", ["fast", "best", "best:gamma=0.5", "best:lexical=1"])
@pytest.mark.parametrize("texts", [[""], ["", " \n"], ["one"], ["same", "same"], ["", "x" * 100_000], ["🙂", "é", "汉字", "\x00"]])
def test_odd_pools_are_scored_without_nan(reranker: Reranker, method: str, texts: list[str]) -> None:
    results = reranker.using(method).rank(QUERY, texts)
    assert sorted(r.index for r in results) == list(range(len(texts)))
    assert all(math.isfinite(r.relevance_score) for r in results)


@pytest.mark.parametrize("query", ["?", "…", "\x00", "🙂🙂"])
def test_a_query_of_odd_characters_is_scored(reranker: Reranker, query: str) -> None:
    assert len(reranker.rank(query, TEXTS)) == len(TEXTS)


@pytest.mark.parametrize(
    ("query", "documents", "options", "message"),
    [
        (" \t", TEXTS, {}, "non-blank"),
        (3, TEXTS, {}, "non-blank"),
        (QUERY, [], {}, "at least one"),
        (QUERY, ["a", 5], {}, r"documents\[1\]"),
        (QUERY, [{"txt": "a"}], {}, r"documents\[0\]"),
        (QUERY, [{"text": None}], {}, r"documents\[0\]"),
        (QUERY, ["a", "b\ud800"], {}, r"documents\[1\].*surrogate"),
        ("q\udfff", TEXTS, {}, "query.*surrogate"),
        (QUERY, TEXTS, {"top_n": 0}, "top_n"),
        (QUERY, TEXTS, {"first_stage": [1.0]}, "first_stage has 1"),
    ],
)
def test_wrong_input_is_named(reranker: Reranker, query: Any, documents: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reranker.rank(query, documents, **options)


def test_vectors_are_made_once(reranker: Reranker) -> None:
    ready = reranker.without_cache()
    new = ready.score(QUERY, TEXTS)
    assert ready.cache is not None and len(ready.cache) == len(TEXTS)
    assert ready.encoder is not None
    encode, encoded = ready.encoder.encode_tokens, []
    ready.encoder.encode_tokens = lambda texts, **options: encoded.extend(texts) or encode(texts, **options)  # type: ignore[method-assign,func-returns-value]
    try:
        seen = ready.score(QUERY, TEXTS)
    finally:
        del ready.encoder.encode_tokens
    (query,) = ready.encoder.tokenize([QUERY], "query", 512)
    assert [text.ids.tolist() for text in encoded] == [query.ids.tolist()]
    assert seen.order == new.order and torch.equal(seen.scores, new.scores)


def test_flops_separate_seen_from_new_documents(reranker: Reranker) -> None:
    ranking, encoder = reranker.score(QUERY, TEXTS + TEXTS), reranker.encoder
    assert isinstance(encoder, BiEncoder)
    lengths = encoder.encode(TEXTS).lengths
    assert ranking.flops.new == encoder.flops(lengths, Detail.TOKENS)
    own = encoder.encode([QUERY], kind="query").lengths
    tokens = 2 * int(own) * 2 * int(lengths.sum()) * 128
    assert ranking.flops.seen == encoder.flops(own, Detail.TOKENS) + 2 * len(TEXTS) * 2 * 384 + tokens


def test_truncated_documents_are_counted() -> None:
    short = Reranker(method="fast", max_tokens_per_doc=5, device="cpu")
    assert short.score(QUERY, ["one two", "one two three four five six", "one two three four five"]).truncated == 1
    a, b = (short.rank(QUERY, [text])[0].relevance_score for text in ("one two three four five", "one two three four five six seven"))
    assert a == pytest.approx(b, abs=1e-5)


def test_the_first_stage_joins_as_a_z_term(reranker: Reranker) -> None:
    fused = reranker.using("fast")
    fused.fuse_first_stage = 0.5
    first = [0.0, 3.0, 1.0, 0.0, 2.0, 9.0]
    plain = reranker.using("fast").score(QUERY, TEXTS)
    cosine = torch.zeros(len(TEXTS)).index_copy_(0, torch.tensor(plain.order), plain.scores)
    both = fused.score(QUERY, TEXTS, first_stage=first)
    stage = torch.tensor(first)
    expected = (cosine - cosine.mean()) / cosine.std(correction=0) + 0.5 * (stage - stage.mean()) / stage.std(correction=0)
    torch.testing.assert_close(both.scores, expected[both.order], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="first_stage is wanted"):
        fused.score(QUERY, TEXTS)


def test_a_model_that_breaks_is_named(reranker: Reranker) -> None:
    broken = Reranker(method="fast", device="cpu")
    assert isinstance(broken.encoder, BiEncoder)
    with torch.no_grad():
        next(broken.encoder.model.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="all-MiniLM-L6-v2"):
        broken.rank(QUERY, TEXTS)


def test_rerank_is_the_same_in_one_call() -> None:
    results = rerank_lab.rerank(QUERY, TEXTS, top_n=1, method="fast")
    assert [(r.index, r.document) for r in results] == [(4, TEXTS[4])]


def test_rerank_reads_a_folder_again_that_was_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["Sort by the values.", "Dot product of two arrays.", "Write a parquet file."]
    monkeypatch.chdir(tmp_path)
    bi_encoder(tmp_path / "m", "Normalize")

    def scores() -> list[float]:
        return [result.relevance_score for result in rerank("dot product", documents, model="m", method="fast", device="cpu")]

    before = scores()
    assert scores() == before
    weights = load_file("m/model.safetensors")
    save_file({name: value.flip(0) if "word_embeddings" in name else value for name, value in weights.items()}, "m/model.safetensors", {"format": "pt"})
    assert scores() != before
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UserError, match="model 'm' is no known id"):
        scores()


def test_documents_seen_before_cost_few_calls(reranker: Reranker) -> None:
    fast, texts, calls = reranker.using("fast"), [f"text number {n} about joining tables" for n in range(20)], 0
    fast.score(QUERY, texts)

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        fast.score(QUERY, texts)
    finally:
        sys.setprofile(before)
    assert 100 < calls < 1050, "Python functions that one ranking calls, the forward of the query among them"
