"""Each method against its formula, which is computed here from the encoder's vectors."""

from __future__ import annotations

import timeit
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rerank_kernels import MIN_TAU
from rerank_lab import Reranker
from rerank_lab.errors import UserError
from rerank_lab.first_stage.lexical import BM25
from rerank_lab.methods import METHODS, Method, labels, make_method, setting, settings_of
from rerank_lab.methods.best import SPREAD_IN_TAUS
from rerank_lab.methods.spread import spread_of
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.cross_encoder import CrossEncoder
from tests.conftest import DOCUMENTS

QUERY = "complex-conjugating dot product"
TEXTS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()] + ["", "A much longer text about sorting. " * 40]


def z(x: np.ndarray) -> np.ndarray:
    centred: np.ndarray = (x - x.mean()) / x.std()
    return centred


def cosines(encoder: BiEncoder) -> np.ndarray:
    query, documents = encoder.encode([QUERY], kind="query").pooled, encoder.encode(TEXTS).pooled
    return (documents.double() @ query[0].double()).numpy()


def attention(encoder: BiEncoder, tau: float) -> np.ndarray:
    """A of `best`, Lq × K, computed one document at a time."""
    q = encoder.encode([QUERY], kind="query").tokens.double().numpy()
    columns = []
    for text in TEXTS:
        d = encoder.encode([text]).tokens.double().numpy()
        s = q @ d.T
        weight = np.exp((s - 1) / tau) if tau else s == s.max(1, keepdims=True, initial=-2)
        columns.append((weight * s).sum(1) / weight.sum(1) if len(d) else np.full(len(q), -1.0))
    return np.stack(columns, 1)


def token_score(A: np.ndarray) -> np.ndarray:
    w = A.max(1) - A.mean(1)
    mean: np.ndarray = w @ A / w.sum()
    return mean


def lengths(encoder: BiEncoder) -> np.ndarray:
    """ln(1 + tokens) of each document."""
    return np.log1p([len(encoder.encode([text]).tokens) for text in TEXTS])


def raw_scores(reranker: Reranker, texts: list[str] = TEXTS) -> np.ndarray:
    ranking = reranker.score(QUERY, texts)
    scores = np.full(len(texts), -np.inf)
    scores[ranking.order] = ranking.scores.numpy()
    return scores


def test_fast_is_the_cosine(reranker: Reranker, encoder: BiEncoder) -> None:
    np.testing.assert_allclose(raw_scores(reranker.using("fast")), cosines(encoder), atol=1e-5)


def test_standard_is_the_logit_shown_as_its_sigmoid(small_cross: Path) -> None:
    reranker = Reranker(None, "standard", str(small_cross), device="cpu")
    assert isinstance(reranker.cross, CrossEncoder)
    logits = torch.cat([reranker.cross.score(QUERY, [text])[0] for text in TEXTS]).double()
    np.testing.assert_allclose(raw_scores(reranker), logits.numpy(), atol=1e-5)
    shown = {r.index: r.relevance_score for r in reranker.rank(QUERY, TEXTS)}
    assert [shown[i] for i in range(len(TEXTS))] == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-5)


@pytest.mark.parametrize("keep", [3, 100])
def test_optimal_cuts_by_cosine_then_sums_z(encoder: BiEncoder, small_cross: Path, keep: int) -> None:
    reranker = Reranker(method=f"optimal:stage1_top_k={keep}:cosine_weight=0.7", model_cross=str(small_cross), device="cpu")
    assert isinstance(reranker.cross, CrossEncoder)
    cosine = cosines(encoder)
    kept = np.argsort(-cosine)[:keep]
    logits = reranker.cross.score(QUERY, [TEXTS[i] for i in kept])[0].double().numpy()
    expected = np.full(len(TEXTS), -np.inf)
    expected[kept] = z(logits) + 0.7 * z(cosine[kept])
    np.testing.assert_allclose(raw_scores(reranker), expected, atol=1e-4)


def auto(encoder: BiEncoder) -> float:
    """The default tau of `best` on this model."""
    return spread_of(encoder).value / SPREAD_IN_TAUS


@pytest.mark.parametrize("tau", [0.1, 0.05, 0.0, "auto"])
def test_best_is_steps_1_to_5(reranker: Reranker, encoder: BiEncoder, tau: float | str) -> None:
    number = auto(encoder) if isinstance(tau, str) else tau
    total = z(cosines(encoder)) + 2 * z(token_score(attention(encoder, number)))
    for length, spec in ((0.2, f"best:tau={tau}"), (0.0, f"best:tau={tau}:length=0"), (-0.7, f"best:tau={tau}:length=-0.7")):
        np.testing.assert_allclose(raw_scores(reranker.using(spec)), z(total + length * lengths(encoder)), atol=1e-4)


def test_best_with_feedback_lexical_term_and_cross_encoder(encoder: BiEncoder, small_cross: Path) -> None:
    reranker = Reranker(method="best:gamma=0.25:lexical=0.5:alpha=3:cross_weight=0.6", model_cross=str(small_cross), device="cpu")
    assert isinstance(reranker.cross, CrossEncoder)
    cosine, logits = cosines(encoder), reranker.cross.score(QUERY, TEXTS)[0].double().numpy()
    bm25 = BM25(TEXTS).scores(QUERY).astype(np.float64)
    b = z(z(cosine) + 3 * z(token_score(attention(encoder, auto(encoder)))) + 0.2 * lengths(encoder) + 0.5 * z(bm25) + 0.6 * z(logits))
    p = np.exp(b / 0.3) / np.exp(b / 0.3).sum()
    e = encoder.encode(TEXTS).pooled.double().numpy()
    np.testing.assert_allclose(raw_scores(reranker), b + 0.25 * z(e @ (p @ e)), atol=2e-4)


def test_best_looks_at_the_nearest_alone(reranker: Reranker, encoder: BiEncoder) -> None:
    kept = np.sort(np.argsort(-cosines(encoder))[:4])
    scores = raw_scores(reranker.using("best:stage1_top_k=4"))
    assert np.flatnonzero(np.isfinite(scores)).tolist() == kept.tolist()
    np.testing.assert_allclose(scores[kept], raw_scores(reranker, [TEXTS[i] for i in kept]), atol=1e-4)


def test_maxsim_is_the_sum_of_each_tokens_best_match_shown_as_it_is(reranker: Reranker, encoder: BiEncoder) -> None:
    maxsim = reranker.using("maxsim")
    np.testing.assert_allclose(raw_scores(maxsim), attention(encoder, 0.0).sum(0), atol=1e-4)
    shown = [(result.index, result.relevance_score) for result in maxsim.rank(QUERY, TEXTS)]
    ranking = maxsim.score(QUERY, TEXTS)
    assert shown == list(zip(ranking.order, ranking.scores.tolist()))
    kept = maxsim.using("maxsim:stage1_top_k=3").score(QUERY, TEXTS)
    assert sorted(kept.order) == sorted(np.argsort(-cosines(encoder), kind="stable")[:3])


def test_the_shipped_subspace_is_in_use_and_orthonormal(encoder: BiEncoder) -> None:
    assert encoder.subspace is not None and encoder.subspace.shape == (384, 128)
    torch.testing.assert_close(encoder.subspace.T @ encoder.subspace, torch.eye(128), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_relevance_rises_with_the_score(name: str) -> None:
    scores = torch.linspace(-8, 8, 4001)
    assert bool((make_method(name).relevance(scores).diff() > 0).all())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bets", "valid: fast, standard, optimal, best, maxsim"),
        ("best:tua=1", "valid: stage1_top_k, tau"),
        ("best:tau", "SETTING=VALUE"),
        ("best:tau=warm", "float values or auto"),
        ("best:tau=0.01", f"at least {MIN_TAU}, not 0.01; auto chooses"),
        ("best:tau=nan", "finite"),
        ("best:stage1_top_k=2.5", "int values"),
        ("optimal:stage1_top_k=0", "at least 1"),
        ("fast:tau=1", "it has none"),
    ],
)
def test_a_wrong_spec_says_what_is_right(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method(spec)


@dataclass(frozen=True)
class Bounded(Method):
    """A method whose settings have bounds, except one."""

    name = "bounded"
    signed: float = setting(0.5, "a weight of either sign", least=-1.0, most=1.0)
    steps: int = setting(0, "none at all is fine", least=0, most=4)
    plain: float = 1.0


def test_settings_are_what_the_class_declares() -> None:
    assert {name: (declared.kind, declared.default, declared.about) for name, declared in settings_of(Bounded).items()} == {
        "signed": (float, 0.5, "a weight of either sign"), "steps": (int, 0, "none at all is fine"), "plain": (float, 1.0, ""),
    }  # fmt: skip
    assert Bounded(signed=-1, steps=np.int64(4)).settings() == {"signed": -1.0, "steps": 4, "plain": 1.0}
    for settings, message in (
        ({"signed": 1.5}, "bounded: signed must be a finite number from -1 to 1, not 1.5"),
        ({"steps": 5}, "bounded: steps must be at most 4, not 5"),
        ({"steps": -1}, "bounded: steps must be at least 0, not -1"),
        ({"plain": -1}, "bounded: plain must be a finite number from 0 to 1e.09, not -1"),
    ):
        with pytest.raises(UserError, match=message):
            Bounded(**settings)


def test_what_a_method_does_with_a_cross_encoder_follows_from_what_it_declares() -> None:
    uses = {name: (kind.uses_cross, kind.optional_cross) for name, kind in METHODS.items()}
    assert uses == {"fast": (False, False), "standard": (True, False), "optimal": (True, False), "best": (True, True), "maxsim": (False, False)}
    assert [*labels()] == ["fast", "standard", "optimal", "best", "best+cross", "maxsim"] and all(labels().values())


@pytest.mark.parametrize("spec", ["best", "best:tau=0.05"])
def test_a_spec_is_read_in_no_time(spec: str) -> None:
    make_method(spec)
    assert min(timeit.repeat(lambda: make_method(spec), number=100, repeat=10)) / 100 < 5e-5, "each request makes a method"


def test_methods_name_the_model_that_they_lack(reranker: Reranker) -> None:
    for method in ("standard", "optimal"):
        with pytest.raises(UserError, match="model_cross"):
            reranker.using(method)
    with pytest.raises(UserError, match="bi-encoder"):
        Reranker(None, "fast")
