"""project_normalize, project_quantize and pool_normalize: the kernels against the definition, in the interpreter or on a GPU.

Tolerances: fp32 2e-6 (1e-5 on a GPU, three TF32 products), results in fp16 1e-3, in bf16 8e-3; int8 to half a step of
1/127 of the row's largest, fp8 to a sixteenth.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rerank_kernels import pool_normalize, project_normalize, project_quantize, reference, use_backend
from tests.conftest import DEVICE, offsets, unit

FLOATS = {torch.float32: 2e-6 if DEVICE.type == "cpu" else 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
STEPS = {torch.int8: 1 / 254, torch.float8_e4m3fn: 1 / 16}


def basis(d: int, r: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(5)))[0]
    return q.to(DEVICE)


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("d", "r"), [(64, 16), (100, 24), (128, 128), (384, 128), (384, None), (1024, 100)])
def test_the_kernel_is_the_definition(d: int, r: int | None, dtype: torch.dtype, out: torch.dtype) -> None:
    h, V = (unit(70, d, 1) * 5).to(dtype), None if r is None else basis(d, r)
    h[3] = 0
    with use_backend("triton"):
        y = project_normalize(h, V, out)
    assert y.dtype == out and not y[3].any()
    wanted = reference.project_normalize(h, None if V is None else V.to(dtype))
    torch.testing.assert_close(y.float(), wanted, atol=FLOATS[out], rtol=0)


@given(st.sampled_from([0, 1, 15, 16, 17, 64, 65, 300]), st.integers(1, 140), st.integers(1, 40), st.sampled_from(list(FLOATS)), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_rows_and_widths(rows: int, d: int, r: int, dtype: torch.dtype, identity: bool) -> None:
    h, V = (unit(rows, d, 1) * 3).to(dtype), None if identity else basis(d, min(r, d)).to(dtype)
    with use_backend("triton"):
        torch.testing.assert_close(project_normalize(h, V), reference.project_normalize(h, V), atol=FLOATS[torch.float32], rtol=0)


def test_rows_wider_than_a_program_holds_still_get_an_answer() -> None:
    h = unit(3, 1500, 1)
    with use_backend("triton"):
        torch.testing.assert_close(project_normalize(h * 2, None), h)
        assert pool_normalize(h, offsets(1, 2)).shape == (2, 1500)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("V", [None, basis(64, 32)], ids=["identity", "projected"])
def test_quantised_rows_and_their_scales_give_the_vectors_back(dtype: torch.dtype, V: Tensor | None, backend: str) -> None:
    h = unit(40, 64, 1) * 3
    h[2] = 0
    h[5, 9] = torch.nan
    with use_backend(backend):
        z, scales = project_quantize(h, V, dtype)
    assert z.dtype == dtype and scales.dtype == torch.float32 and scales[2] == 0
    y, wanted = reference.dequantize(z, scales), reference.project_normalize(h, V)
    assert y[5].isnan().all()
    rest = torch.arange(40, device=DEVICE) != 5
    largest = wanted[rest].abs().amax(1, keepdim=True)
    good = (y[rest] - wanted[rest]).abs() <= largest * STEPS[dtype] + 1e-6
    if DEVICE.type == "cpu" and dtype == torch.float8_e4m3fn:  # the interpreter loses the carry of a mantissa that rounds up to a power of two
        good |= torch.frexp(reference.quantize(wanted[rest], dtype)[0].float())[0].abs() == 0.5
    assert good.all()
    assert (z[rest & (scales != 0)].float().abs().amax(1) == reference.LARGEST[dtype]).all()
    assert torch.equal(z[rest].float(), reference.quantize(wanted[rest], dtype)[0].float()) or dtype != torch.int8 or DEVICE.type == "cuda"


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 40), st.sampled_from(list(FLOATS)))
@settings(max_examples=20, deadline=None)
def test_pool_normalize_is_the_definition(lengths: list[int], d: int, dtype: torch.dtype) -> None:
    h = unit(sum(lengths), d, 1).to(dtype)
    with use_backend("triton"):
        pooled = pool_normalize(h, offsets(*lengths))
    torch.testing.assert_close(pooled, reference.pool_normalize(h, offsets(*lengths)), atol=3e-6, rtol=0)


def test_a_nan_stays_in_its_row_and_its_text() -> None:
    h = unit(9, 16, 1)
    h[4, 2] = torch.nan
    for backend in ("auto", "triton"):
        with use_backend(backend):
            assert project_normalize(h, basis(16, 8)).isnan().any(1).nonzero().flatten().tolist() == [4]
            assert pool_normalize(h, offsets(3, 0, 3, 3)).isnan().any(1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("r", [8, None])
def test_gradients_are_those_of_the_definition(backend: str, r: int | None) -> None:
    grad = torch.randn(21, r or 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for function in (project_normalize, reference.project_normalize):
        h, V = (unit(21, 24, 1) * 2).requires_grad_(), None if r is None else basis(24, r).requires_grad_()
        with use_backend(backend):
            function(h, V).backward(grad)  # type: ignore[no-untyped-call]
        found.append([h.grad] if V is None else [h.grad, V.grad])
    for ours, theirs in zip(*found):
        assert theirs is not None and theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=5e-6 if DEVICE.type == "cpu" else 1e-3, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_of_the_pooled_mean(backend: str) -> None:
    grad, found = unit(3, 10, 4), []
    for function in (pool_normalize, reference.pool_normalize):
        h = unit(7, 10, 1).requires_grad_()
        with use_backend(backend):
            function(h, offsets(2, 0, 5)).backward(grad)  # type: ignore[no-untyped-call]
        found.append(h.grad)
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-5)


def test_torch_sees_registered_operators() -> None:
    h, V = unit(6, 16, 1).requires_grad_(), basis(16, 8).requires_grad_()
    operators = torch.ops.rerank_kernels
    torch.library.opcheck(operators.project_normalize.default, (h, V, torch.float32))
    torch.library.opcheck(operators.project_normalize.default, (h, None, torch.float16))
    torch.library.opcheck(operators.project_normalize.default, (h.detach(), V.detach(), torch.int8))
    torch.library.opcheck(operators.project_normalize_backward.default, (unit(6, 8), h.detach(), V.detach()))
    torch.library.opcheck(operators.pool_normalize.default, (h, offsets(2, 4)))
    offsets_ = offsets(2, 4)
    compiled = torch.compile(lambda h: pool_normalize(project_normalize(h, V), offsets_), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), pool_normalize(project_normalize(h, V), offsets_))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((unit(3, 4)[0], None), "^h must be a matrix"),
        ((unit(3, 4).int(), None), "^h must be float32"),
        ((unit(3, 4), basis(5, 2)), "^V must be of 4 rows"),
        ((unit(3, 4), basis(4, 2)[0]), "^V must be a matrix"),
        ((unit(3, 4), None, torch.int8), "^dtype must be"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project_normalize(*arguments)  # type: ignore[arg-type]


def test_pool_and_quantise_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^dtype must be int8"):
        project_quantize(unit(3, 4), None, torch.float16)
    for wrong in (offsets(2), offsets(2, 2), offsets(3).int(), torch.tensor([0, 3, 2, 3], device=DEVICE)):
        with pytest.raises(ValueError, match=r"^offsets must"):
            pool_normalize(unit(3, 4), wrong)
