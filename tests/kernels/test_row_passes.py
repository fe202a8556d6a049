"""bias_gelu_ and add_norm_ are torch's, at every level of the C library and without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from rerank_kernels import add_norm_, bias_gelu_, use_backend

LEVELS = ["avx512", "avx2", "baseline", "torch"]
SHAPES = [(1, 1), (3, 5), (40, 16), (33, 100), (70, 384), (2, 1536)]


def given(n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual, bias, weight, shift."""
    g = torch.Generator().manual_seed(n * d)
    return [(3 * torch.randn(*shape, generator=g)).to(dtype) for shape in ((n, d), (n, d), (d,), (d,), (d,))]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_both_are_torchs(level: str, n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KERNELS_SIMD", level)
    x, residual, bias, weight, shift = given(n, d)
    wanted = gelu((x + bias).double())
    y = x.clone()
    assert bias_gelu_(y, bias) is y
    torch.testing.assert_close(y.double(), wanted, atol=1e-6, rtol=1e-6)
    for own in (bias, None):
        total = (x.double() + residual + (0 if own is None else own.double())).detach()
        wanted = layer_norm(total, (d,), weight.double(), shift.double(), 1e-3)
        y = x.clone()
        assert add_norm_(y, own, residual, weight, shift, 1e-3) is y
        torch.testing.assert_close(y.double(), wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_gelu_of_every_size_of_number(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KERNELS_SIMD", level)
    line = torch.cat([torch.linspace(-30, 30, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30])])
    x = line[:, None].repeat(1, 3)
    found = bias_gelu_(x, torch.zeros(3))
    torch.testing.assert_close(found[:, 0].double(), gelu(line.double()), atol=2e-6 if level == "torch" else 4e-7, rtol=1e-6)
    odd = bias_gelu_(torch.tensor([[torch.nan, 1.0, -torch.inf]]), torch.zeros(3))[0]
    assert odd[0].isnan() and odd[1] == pytest.approx(0.8413447) and (odd[2] == 0 or odd[2].isnan())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_rows_that_are_apart(backend: str, dtype: torch.dtype) -> None:
    x, residual, bias, weight, shift = given(20, 64, dtype)
    wide = torch.zeros(20, 100, dtype=dtype)
    atol = 1e-5 if dtype == torch.float32 else 0.1
    with use_backend(backend):
        wide[:, 10:74] = x
        bias_gelu_(wide[:, 10:74], bias)
        torch.testing.assert_close(wide[:, 10:74].double(), gelu(x.double() + bias.double()), atol=atol, rtol=1e-2)
        assert not wide[:, :10].any() and not wide[:, 74:].any()
        wide[:, 10:74] = x
        add_norm_(wide[:, 10:74], bias, residual, weight, shift, 1e-5)
        wanted = layer_norm((x.double() + bias.double() + residual.double()), (64,), weight.double(), shift.double(), 1e-5)
        torch.testing.assert_close(wide[:, 10:74].double(), wanted, atol=atol, rtol=1e-2)


def test_a_nan_stays_in_its_row() -> None:
    x, residual, bias, weight, shift = given(40, 32)
    x[7, 3] = torch.nan
    y = add_norm_(x.clone(), bias, residual, weight, shift, 1e-5)
    assert y[7].isnan().all() and not y[torch.arange(40) != 7].isnan().any()
    y = bias_gelu_(x.clone(), bias)
    assert y.isnan().sum() == 1 and y[7, 3].isnan()


def test_any_number_of_threads_gives_the_same() -> None:
    x, residual, bias, weight, shift = given(200, 96)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(torch.cat([bias_gelu_(x.clone(), bias), add_norm_(x.clone(), bias, residual, weight, shift, 1e-5)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_where_a_gradient_is_wanted_it_comes() -> None:
    x, residual, bias, weight, shift = given(5, 16)
    residual.requires_grad_(), bias.requires_grad_()
    torch.autograd.backward(add_norm_(bias_gelu_(x, bias), None, residual, weight, shift, 1e-5).sum())
    assert residual.grad is not None and bias.grad is not None and float(bias.grad.abs().sum()) > 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_does_not_fit_is_named(backend: str) -> None:
    x, residual, bias, weight, shift = given(4, 8)
    with use_backend(backend):
        for name, bad in {"residual": residual[:3], "weight": weight[:7], "shift": shift.double(), "bias": bias.half()}.items():
            arguments = {"bias": bias, "residual": residual, "weight": weight, "shift": shift} | {name: bad}
            with pytest.raises(ValueError, match=f"^{name} must be .* not"):
                add_norm_(x, eps=1e-5, **arguments)
        with pytest.raises(ValueError, match=r"^bias must be .* not"):
            bias_gelu_(x, bias[:3])
        with pytest.raises(ValueError, match=r"^x must be a matrix"):
            bias_gelu_(x[0], bias)
    assert torch.equal(x, given(4, 8)[0]), "untouched"
