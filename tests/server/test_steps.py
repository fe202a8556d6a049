"""A ranking in steps equals the ranking by Reranker, and work that rankings share is done once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rerank_lab.cache.vectors import VectorCache
from rerank_lab.engine import Engine
from rerank_lab.errors import UserError
from rerank_lab.models.base import Detail, Tokens, Vectors
from rerank_lab.reranker import Ranking, Reranker
from rerank_lab.server.fleet import Fleet
from rerank_lab.server.steps import Steps, TextUnit
from tests.conftest import DOCUMENTS, QUERIES, load_bi

TEXTS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()] + ["", "Dot product of two arrays."]
METHODS = ["fast", "best:stage1_top_k=4", "standard", "optimal:stage1_top_k=3", "best+cross"]


@pytest.fixture(scope="module")
def fleet(small_cross: Path) -> Fleet:
    return Fleet.load(["all-MiniLM-L6-v2"], ["minilm-cross", str(small_cross)], device="cpu")


def run(all_steps: Sequence[Steps]) -> list[Ranking]:
    """Runs several rankings to their ends. Every unit runs together with all others of its group."""
    rankings: list[Ranking | None] = [None] * len(all_steps)
    while None in rankings:
        groups: dict[object, list[object]] = {}
        for steps, ranking in zip(all_steps, rankings):
            for unit in steps.units if ranking is None else []:
                groups.setdefault(unit.group, []).append(unit)
        for units in groups.values():
            units[0].run(units)  # type: ignore[attr-defined]
        rankings = [steps.advance() if ranking is None else ranking for steps, ranking in zip(all_steps, rankings)]
    return [ranking for ranking in rankings if ranking is not None]


@pytest.mark.parametrize("cross", [0, 1], ids=["one-way", "classifier"])
@pytest.mark.parametrize("spec", METHODS)
def test_steps_in_company_give_what_score_gives_alone(fleet: Fleet, spec: str, cross: int) -> None:
    uses = spec.startswith(("standard", "optimal", "best+"))
    model = None if spec == "standard" else "all-MiniLM-L6-v2"
    reranker = fleet.reranker(spec.replace("+cross", ""), model, list(fleet.crosses)[cross] if uses else None)
    pools = [TEXTS[n:] + TEXTS[:n] + [f"{query} again"] for n, query in enumerate(QUERIES.values())]
    together = run([Steps(reranker, query, pool) for query, pool in zip(QUERIES.values(), pools)])
    for query, pool, ranking in zip(QUERIES.values(), pools, together):
        alone = reranker.without_cache().score(query, pool)
        assert ranking.order == alone.order
        torch.testing.assert_close(ranking.relevance, alone.relevance, atol=1e-5, rtol=0)
        assert ranking.truncated == alone.truncated and ranking.tokens == alone.tokens > 0


def test_a_text_that_several_ask_for_is_encoded_once(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = fleet.reranker("fast", "all-MiniLM-L6-v2", None)
    encoded: list[Tokens] = []
    encode = fleet.encoders["all-MiniLM-L6-v2"].encode_tokens

    def counted(texts: Sequence[Tokens], *, detail: Detail) -> Vectors:
        encoded.extend(texts)
        return encode(texts, detail=detail)

    monkeypatch.setattr(fleet.encoders["all-MiniLM-L6-v2"], "encode_tokens", counted)
    texts = ["only this test asks for it", "and for this", "only this test asks for it"]
    run([Steps(reranker, "who asks", texts) for _ in range(3)])
    assert len(encoded) == 2 + 3, "two texts, three queries"
    again = Steps(reranker, "who else asks", texts)
    assert not [unit for unit in again.units if isinstance(unit, TextUnit)] and (again.pool.seen, again.pool.new) == (2, 0)


def test_what_a_ranking_has_borrowed_outlives_the_cache(fleet: Fleet) -> None:
    reranker = fleet.reranker("standard", None, "minilm-cross")
    want = reranker.without_cache().score("dot", TEXTS)
    small = VectorCache("small", memory_bytes=1)
    engine = Engine(None, reranker.cross, dict.fromkeys(reranker.engine.caches, small))
    reranker = Reranker.of(engine, "standard")
    assert run([Steps(reranker, "dot", TEXTS)])[0].order == want.order
    assert small.held_bytes == 0


def test_borrowing_while_another_thread_drops() -> None:
    shared = VectorCache("shared", memory_bytes=0)
    encoder = load_bi("all-MiniLM-L6-v2", device="cpu")
    vectors, stop, errors = encoder.encode(["a"]), threading.Event(), []

    def borrow() -> None:
        while not stop.is_set():
            own = VectorCache("own")
            try:
                if not own.borrow(shared, [b"key"], Detail.TOKENS):
                    own.gather([b"key"], Detail.TOKENS)
            except KeyError as error:
                errors.append(error)

    thread = threading.Thread(target=borrow)
    thread.start()
    for _ in range(3000):
        shared.add([b"key"], vectors, Detail.TOKENS)
        shared.trim()
    stop.set()
    thread.join()
    assert errors == []


@pytest.mark.parametrize(("query", "texts"), [(" ", ["a"]), ("q", []), ("q", ["\ud800"])])
def test_wrong_input_is_named(fleet: Fleet, query: str, texts: list[str]) -> None:
    with pytest.raises(UserError):
        Steps(fleet.reranker("fast", "all-MiniLM-L6-v2", None), query, texts)


def test_a_fleet_loads_each_model_once(fleet: Fleet) -> None:
    encoder = fleet.encoders["all-MiniLM-L6-v2"]
    assert getattr(fleet.crosses["minilm-cross"], "encoder") is encoder and list(fleet.caches) == [id(encoder)]  # noqa: B009
    one, other = (fleet.reranker(method, "all-MiniLM-L6-v2", "minilm-cross") for method in ("best", "optimal"))
    assert one.engine is other.engine and one.cache is fleet.caches[id(encoder)]
