"""The definitions against the formulas written once more in numpy, fp64, loop by loop. Tolerance 2e-6 in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rerank_kernels import MIN_TAU, contrast_score, pool_normalize, project_normalize, similarity_topk, subspace_attention, use_backend, zscore
from rerank_kernels.reference import softmax_shift
from tests.kernels import extremes

TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def definitions() -> Iterator[None]:
    with use_backend("reference"):
        yield


def unit(rows: int, columns: int, seed: int) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def z64(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std() if x.std() > 0 else np.zeros_like(x)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from([0.0, MIN_TAU, 0.025, 0.1, 1.0])
)
@settings(max_examples=60, deadline=None)
def test_subspace_attention_is_its_formula(query_lengths: list[int], document_lengths: list[int], tau: float) -> None:
    q, d = unit(sum(query_lengths), 8, 1), unit(sum(document_lengths), 8, 2)
    qo, do = offsets(*query_lengths), offsets(*document_lengths)
    pairs = [(b, n) for b in range(len(query_lengths)) for n in range(len(document_lengths))]
    expected: list[float] = []
    for b, n in pairs:
        for i in range(int(qo[b]), int(qo[b + 1])):
            s = [float(np.dot(q[i].double().numpy(), d[j].double().numpy())) for j in range(int(do[n]), int(do[n + 1]))]
            if not s:
                expected.append(-1.0)
            elif tau == 0:
                expected.append(max(s))
            else:
                weights = [np.exp((value - 1) / tau) for value in s]
                expected.append(sum(w * value for w, value in zip(weights, s)) / sum(weights))
    A = subspace_attention(q, qo, d, do, torch.tensor(pairs), tau)
    assert A.dtype == torch.float32
    np.testing.assert_allclose(A.numpy(), np.array(expected, dtype=np.float64), atol=TOLERANCE)


def test_subspace_attention_survives_opposite_and_equal_tokens_at_the_smallest_tau() -> None:
    x = unit(1, 16, 3)
    A = subspace_attention(x, offsets(1), torch.cat([-x, -x, x]), offsets(2, 1), torch.tensor([[0, 0], [0, 1]]), MIN_TAU)
    torch.testing.assert_close(A, torch.tensor([-1.0, 1.0]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tau", [MIN_TAU, 0.015, 0.02, 0.0249, 0.025, 0.03, 0.1, 1.0])
def test_every_weight_and_the_sum_of_33_million_are_normal_numbers(tau: float) -> None:
    low, high = (np.exp((s - softmax_shift(tau)) / tau) for s in (-1, 1))
    assert 2.0**-126 <= low <= high and high * 2.0**25 <= 2.0**126  # the reciprocal of a larger sum would be subnormal
    assert tau < 0.025 or softmax_shift(tau) == 1


@pytest.mark.parametrize("tau", extremes.TAUS)
def test_subspace_attention_at_both_ends_is_a_softmax_in_fp64(tau: float) -> None:
    A, *gradients = extremes.exact(extremes.documents(), tau)
    q, q_offsets, d, d_offsets, pairs = extremes.packed(extremes.documents())
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    found = subspace_attention(q, q_offsets, d, d_offsets, pairs, tau)
    torch.testing.assert_close(found.double(), A, atol=TOLERANCE, rtol=0)
    found.sum().backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip((q.grad, d.grad), gradients):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tau", [MIN_TAU, 0.0249])
def test_subspace_attention_of_a_million_tokens_stays_in_range(tau: float) -> None:
    arguments = extremes.packed(tuple(x.repeat(extremes.REPEATS, 1) for x in extremes.fours()))
    torch.testing.assert_close(subspace_attention(*arguments, tau).double(), extremes.exact(extremes.fours(), tau)[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tau", [0.001, 0.0129, -0.1])
def test_a_tau_that_underflows_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=r"tau must be 0 \(MaxSim\) or at least 0\.013"):
        subspace_attention(unit(1, 4, 0), offsets(1), unit(1, 4, 0), offsets(1), torch.tensor([[0, 0]]), tau)


@pytest.mark.parametrize(
    ("q_offsets", "pairs", "message"),
    [
        (offsets(1), [[0, 0]], "q_offsets"),
        (torch.tensor([0, 2], dtype=torch.int32), [[0, 0]], "int64"),
        (offsets(2), [[0, 1]], "pairs must be .* not"),
        (offsets(2), [[-1, 0]], "pairs must be .* not"),
        (offsets(2), [[0]], "P × 2"),
    ],
)
def test_subspace_attention_refuses_what_does_not_fit(q_offsets: Tensor, pairs: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subspace_attention(unit(2, 4, 0), q_offsets, unit(3, 4, 1), offsets(3), torch.tensor(pairs))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_similarity_topk_orders_ties_by_index_and_pads(metric: str) -> None:
    documents = torch.tensor([[1.0, 0], [0, 2], [1, 0], [0, 0], [3, 0]])
    queries, segments = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([0, 5, 8])
    values, index = similarity_topk(queries, torch.cat([documents, documents[:3]]), 7, segments, metric)
    expected = {"cosine": [0, 2, 4, 1, 3, -1, -1], "dot": [4, 0, 2, 1, 3, -1, -1]}
    assert index[0].tolist() == expected[metric] and index[1].tolist() == [1, 0, 2, -1, -1, -1, -1]
    assert values[0, 5:].tolist() == [-torch.inf] * 2 and not values.isnan().any()
    assert values[1, 0] == (1.0 if metric == "cosine" else 2.0)


def test_similarity_topk_keeps_each_query_to_its_segment() -> None:
    queries, documents = unit(3, 8, 4), unit(10, 8, 5)
    segments = torch.tensor([0, 4, 4, 10])
    values, index = similarity_topk(queries, documents, 5, segments)
    for b, (start, end) in enumerate([(0, 4), (4, 4), (4, 10)]):
        cosine = documents[start:end].double() @ queries[b].double()
        best = cosine.sort(descending=True).indices[:5]
        assert index[b].tolist() == best.tolist() + [-1] * (5 - len(best))
        torch.testing.assert_close(values[b, : len(best)].double(), cosine[best], atol=TOLERANCE, rtol=0)


@given(st.integers(1, 5), st.integers(0, 4), st.sampled_from([0.0, 0.25]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_contrast_score_is_its_formula(K: int, Lq: int, gamma: float, with_term: bool) -> None:
    rng = np.random.default_rng(K * 100 + Lq)
    A, cosine, term, e = rng.uniform(-1, 1, (K, Lq)), rng.uniform(-1, 1, K), rng.normal(size=K), unit(K, 6, 7).double().numpy()
    total = z64(cosine)
    if Lq:
        w = A.max(0) - A.mean(0)
        w = w if w.sum() > 1e-6 else np.ones(Lq)
        total = total + 2 * z64(A @ w / w.sum())
    if with_term:
        total = total + 0.5 * z64(term)
    b = z64(total)
    if gamma:
        p = np.exp(b / 0.3) / np.exp(b / 0.3).sum()
        b = b + gamma * z64(e @ (p @ e))
    terms = [(torch.tensor(term), 0.5)] if with_term else []
    got = contrast_score(
        torch.tensor(A, dtype=torch.float32).flatten(), torch.arange(K + 1) * Lq, torch.tensor([0, K]), torch.tensor(cosine, dtype=torch.float32),
        terms=terms, gamma=gamma, embeddings=torch.tensor(e, dtype=torch.float32),
    )  # fmt: skip
    np.testing.assert_allclose(got.numpy(), b, atol=2e-4)  # z divides by a small std: fp32 rounding grows with it


def test_contrast_score_keeps_pools_apart() -> None:
    A, cosine = torch.rand(3 * 4 + 2 * 5), torch.rand(5)
    ends = torch.cat([torch.arange(4) * 4, 12 + torch.arange(1, 3) * 5])
    both = contrast_score(A, ends, torch.tensor([0, 3, 3, 5]), cosine)
    alone = contrast_score(A[:12], ends[:4], torch.tensor([0, 3]), cosine[:3])
    torch.testing.assert_close(both[:3], alone)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6])
def test_zscore_of_equal_values_is_zero_even_after_rounding(value: float) -> None:
    assert zscore(torch.full((7,), value)).tolist() == [0.0] * 7
    rounded = torch.tensor([0.7, 0.7 + 6e-8, 0.7 - 6e-8])
    assert zscore(rounded).tolist() == [0.0] * 3
    assert zscore(torch.tensor([0.7, 0.7001])).tolist() == pytest.approx([-1.0, 1.0])
    assert zscore(torch.zeros(0)).shape == (0,)


def test_zscore_leaves_a_nan_out_and_hands_it_on() -> None:
    x = torch.tensor([1.0, torch.nan, 3.0, 2.0])
    torch.testing.assert_close(zscore(x), torch.tensor([*zscore(x[[0, 2, 3]]).tolist()])[[0, 0, 1, 2]].where(~x.isnan(), x), equal_nan=True)
    assert zscore(torch.tensor([torch.nan, torch.nan])).isnan().all()


def test_pool_normalize_is_the_unit_mean_and_zero_for_nothing() -> None:
    h = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    pooled = pool_normalize(h, offsets(2, 0, 3))
    for row, part in zip(pooled, (h[:2], h[:0], h[2:])):
        mean = part.double().mean(0) if len(part) else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(row.double(), mean / mean.norm() if len(part) else mean, atol=TOLERANCE, rtol=0)


def test_project_normalize_projects_then_normalises() -> None:
    h, V = torch.randn(4, 6), torch.linalg.qr(torch.randn(6, 2)).Q
    x = h.double() @ V.double()
    torch.testing.assert_close(project_normalize(h, V).double(), x / x.norm(dim=1, keepdim=True), atol=TOLERANCE, rtol=0)
    assert project_normalize(torch.zeros(1, 6), V).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(project_normalize(h, None), torch.nn.functional.normalize(h, dim=-1))
