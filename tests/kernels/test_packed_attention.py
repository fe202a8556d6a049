"""packed_attention is torch's attention text by text, at every level of the C library and without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rerank_kernels import packed_attention, use_backend

LENGTHS = [(7, 7), (1, 1), (0, 5), (33, 33), (1, 64), (64, 64), (17, 200), (3, 0), (200, 200)]


def inputs(dim: int = 32, heads: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    wanted, held = ([n[i] for n in LENGTHS] for i in (0, 1))
    d = dim * heads
    joined = torch.randn(sum(held), 2 * d).to(dtype)  # slices of columns, as a transformer has them
    q = torch.randn(sum(wanted), 3 * d).to(dtype)[:, d : 2 * d]
    return q, joined[:, :d], joined[:, d:], torch.tensor([0, *wanted]).cumsum(0), torch.tensor([0, *held]).cumsum(0), heads


def expected(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, heads: int) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for n in range(len(q_offsets) - 1):
        a, b, c, d = int(q_offsets[n]), int(q_offsets[n + 1]), int(k_offsets[n]), int(k_offsets[n + 1])
        if c < d:
            Q, K, V = (x.double().reshape(-1, heads, x.shape[1] // heads).transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
            out[a:b] = scaled_dot_product_attention(Q, K, V).transpose(0, 1).flatten(1)
    return out


@pytest.mark.parametrize("level", ["avx512", "avx2", "baseline", "torch"])
@pytest.mark.parametrize(("dim", "heads"), [(32, 4), (64, 2), (5, 3), (16, 1)])
def test_it_is_attention_text_by_text(level: str, dim: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KERNELS_SIMD", level)
    given = inputs(dim, heads)
    torch.testing.assert_close(packed_attention(*given).double(), expected(*given), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("level", ["avx512", "avx2", "baseline", "torch", "reference"])
def test_a_bias_of_the_query_is_added_and_those_of_keys_and_values_can_be_left_out(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, q_offsets, k_offsets, heads = inputs()
    k_offsets = q_offsets.clone()
    k, v = k[: len(q)], v[: len(q)]
    biases = torch.randn(3, q.shape[1], generator=torch.Generator().manual_seed(1))
    wanted = expected(q + biases[0], k + biases[1], v + biases[2], q_offsets, k_offsets, heads)
    monkeypatch.setenv("RERANK_KERNELS_SIMD", "torch" if level == "reference" else level)
    with use_backend("reference" if level == "reference" else "cpu"):
        found = packed_attention(q, k, v, q_offsets, k_offsets, heads, biases[0]) + biases[2]
        with pytest.raises(ValueError, match=r"q_bias must be .* not"):
            packed_attention(q, k, v, q_offsets, k_offsets, heads, biases[0, :3])
    torch.testing.assert_close(found.double(), wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_backends(backend: str, dtype: torch.dtype) -> None:
    given = inputs(dtype=dtype)
    with use_backend(backend):
        found = packed_attention(*given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected(*given), atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_large_scores_and_nan_stay_in_their_text() -> None:
    q, k, v, q_offsets, k_offsets, heads = inputs()
    q, k = q.clone() * 300, k.clone()
    k[int(k_offsets[3])] = torch.nan
    found = packed_attention(q, k, v, q_offsets, k_offsets, heads)
    text = torch.zeros(len(q), dtype=torch.bool)
    text[int(q_offsets[3]) : int(q_offsets[4])] = True
    assert bool(found[text].isnan().all()) and bool(found[~text].isfinite().all())
    clean = torch.where(k.isnan(), 0.0, k)
    torch.testing.assert_close(found[~text].double(), expected(q, clean, v, q_offsets, k_offsets, heads)[~text], atol=1e-4, rtol=1e-4)


def test_threads_do_not_change_a_bit() -> None:
    given, threads = inputs(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = packed_attention(*given)
        torch.set_num_threads(3)
        assert torch.equal(packed_attention(*given), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads must be a divisor of 128"),
        ({"k": torch.zeros(3, 64)}, "k and v"),
        ({"q_offsets": torch.tensor([0, 1])}, "k_offsets"),
        ({"k_offsets": torch.tensor([0, 9, 5, 12, 45, 109, 173, 373, 373, 573])}, "k_offsets must rise"),
        ({"q": torch.zeros(326, 128, dtype=torch.float16)}, "one float type"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "q_offsets", "k_offsets", "heads")
    with pytest.raises(ValueError, match=message):
        packed_attention(**dict(zip(names, inputs())) | change)


def test_where_a_gradient_is_wanted_it_comes() -> None:
    q, k, v, q_offsets, k_offsets, heads = inputs()
    k = k.clone().requires_grad_()
    torch.autograd.backward(packed_attention(q, k, v, q_offsets, k_offsets, heads).square().sum())
    assert k.grad is not None and float(k.grad.abs().sum()) > 0


def test_a_bias_elsewhere_is_refused() -> None:
    q, k, v, q_offsets, k_offsets, heads = inputs()
    with pytest.raises(ValueError, match="q_bias must be on"):
        packed_attention(q, k, v, q_offsets, k_offsets, heads, torch.zeros(q.shape[1], device="meta"))
