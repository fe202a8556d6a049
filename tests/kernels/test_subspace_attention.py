"""The Triton kernel against the definition, in the interpreter or on a GPU.

Both multiply the same rounded vectors and sum in fp32: 3e-6 in the interpreter for every dtype. A GPU's matrix units
keep fewer bits of a sum (fp32 goes through three TF32 products): 3e-5. A query in fp32 against fp16 documents is rounded
to fp16 first: 1e-3, bf16 8e-3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rerank_kernels import MIN_TAU, reference, subspace_attention, use_backend
from rerank_kernels.subspace_attention import configuration
from tests.conftest import DEVICE, offsets, unit
from tests.kernels import extremes

TOLERANCE = 3e-6 if DEVICE.type == "cpu" else 3e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
LENGTHS = [0, 1, 15, 16, 17, 64, 65, 300]


def stored(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return reference.quantize(x, dtype) if dtype in reference.LARGEST else (x.to(dtype), None)


def pairs_of(queries: int, documents: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(queries, device=DEVICE), torch.arange(documents, device=DEVICE))


def triton(*arguments: object, **named: object) -> Tensor:
    with use_backend("triton"):
        return subspace_attention(*arguments, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 100, 128, 384, 1024])
def test_the_kernel_is_the_definition(d: int, dtype: torch.dtype) -> None:
    query_lengths = [5, 0, 33]
    q, (x, scales) = unit(sum(query_lengths), d, 1), stored(unit(sum(LENGTHS), d, 2), dtype)
    q = q.to(torch.float16 if scales is not None else dtype)
    pairs = pairs_of(3, len(LENGTHS)).flip(0)
    for tau in (0.0, MIN_TAU, 0.1):
        arguments = q, offsets(*query_lengths), x, offsets(*LENGTHS), pairs, tau, scales
        A = triton(*arguments)
        assert A.dtype == torch.float32
        torch.testing.assert_close(A, reference.subspace_attention(*arguments), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("Lq", [1, 16, 17, 32, 64, 65, 512])
def test_every_length_of_query(Lq: int) -> None:
    arguments = unit(Lq, 64, 1), offsets(Lq), unit(90, 64, 2), offsets(20, 70), torch.tensor([[0, 1], [0, 0]], device=DEVICE)
    torch.testing.assert_close(triton(*arguments), reference.subspace_attention(*arguments), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_vectors_out_of_range_and_infinities(tau: float) -> None:
    x = unit(1, 16, 3)
    for factor in (0.0, 1e-30, 1.5, 50.0, -50.0, 1e30, float("inf")):
        arguments = x, offsets(1), torch.cat([x, unit(70, 16, 4)]) * factor, offsets(71), pairs_of(1, 1), tau
        torch.testing.assert_close(triton(*arguments), reference.subspace_attention(*arguments), atol=TOLERANCE, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.int8, 1e-3)], ids=str)
def test_an_fp32_query_is_rounded_to_what_documents_are_computed_in(dtype: torch.dtype, tolerance: float) -> None:
    x, scales = stored(unit(50, 128, 2), dtype)
    arguments = unit(20, 128, 1), offsets(20), x, offsets(50), torch.tensor([[0, 0]], device=DEVICE), 0.1, scales
    torch.testing.assert_close(triton(*arguments), reference.subspace_attention(*arguments), atol=tolerance, rtol=0)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.lists(st.integers(0, 70), min_size=1, max_size=4), st.integers(1, 70), st.data())
@settings(max_examples=25, deadline=None)
def test_any_lengths_any_width_any_pairs(query_lengths: list[int], lengths: list[int], d: int, data: st.DataObject) -> None:
    pair = st.tuples(st.integers(0, len(query_lengths) - 1), st.integers(0, len(lengths) - 1))
    pairs = torch.tensor(data.draw(st.lists(pair, max_size=6)), dtype=torch.int64, device=DEVICE).view(-1, 2)
    tau, dtype = data.draw(st.sampled_from([0.0, MIN_TAU, 0.025, 1.0])), data.draw(st.sampled_from([torch.float32, torch.float16]))
    arguments = unit(sum(query_lengths), d, 1).to(dtype), offsets(*query_lengths), unit(sum(lengths), d, 2).to(dtype), offsets(*lengths), pairs, tau
    torch.testing.assert_close(triton(*arguments), reference.subspace_attention(*arguments), atol=TOLERANCE, rtol=0)


def test_opposite_and_equal_tokens_at_the_smallest_tau() -> None:
    x = unit(1, 16, 3)
    A = triton(x, offsets(1), torch.cat([-x, -x, x]), offsets(2, 1), pairs_of(1, 2), MIN_TAU)
    torch.testing.assert_close(A, torch.tensor([-1.0, 1.0], device=DEVICE), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e4])
@pytest.mark.parametrize("tau", extremes.TAUS)
def test_both_ends_and_their_gradients_of_any_size_are_a_softmax_in_fp64(tau: float, size: float) -> None:
    A, *gradients = extremes.exact(extremes.documents(), tau)
    q, q_offsets, d, d_offsets, pairs = (x.to(DEVICE) for x in extremes.packed(extremes.documents()))
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    found = triton(q, q_offsets, d, d_offsets, pairs, tau)
    torch.testing.assert_close(found.double().cpu(), A, atol=TOLERANCE, rtol=0)
    found.backward(torch.full_like(found, size))  # type: ignore[no-untyped-call]
    for ours, theirs in zip((q.grad, d.grad), gradients):
        assert ours is not None
        torch.testing.assert_close(ours.double().cpu() / size, theirs, atol=2e-5 if DEVICE.type == "cpu" else 2e-3, rtol=1e-5)


@pytest.mark.parametrize("tau", [MIN_TAU, 0.0249])
def test_long_documents_at_both_ends(tau: float) -> None:
    arguments = (x.to(DEVICE) for x in extremes.packed(tuple(x.repeat(1024, 1) for x in extremes.fours())))
    found = triton(*arguments, tau)
    torch.testing.assert_close(found.double().cpu(), extremes.exact(extremes.fours(), tau)[0], atol=1e-5 if DEVICE.type == "cpu" else TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_a_nan_stays_in_its_document(backend: str, tau: float) -> None:
    if backend == "cpu" and DEVICE.type != "cpu":
        pytest.skip("needs CPU tensors")
    x = unit(61, 20, 1)
    x[13, 7] = torch.nan
    with use_backend(backend):
        A = subspace_attention(unit(5, 20, 2), offsets(5), x, offsets(3, 40, 17, 1), pairs_of(1, 4), tau).view(4, 5)
    assert A[1].isnan().all() and not A[[0, 2, 3]].isnan().any()


def test_nan_scales_and_columns_with_strides() -> None:
    x, scales = reference.quantize(unit(30, 32, 1), torch.int8)
    scales[4] = torch.nan
    A = triton(unit(3, 64, 2)[:, ::2], offsets(3), x, offsets(10, 20), pairs_of(1, 2), 0.1, scales).view(2, 3)
    assert A[0].isnan().all() and not A[1].isnan().any()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a sparse file stands for the memory")
def test_documents_past_two_to_the_31_elements(tmp_path: Path) -> None:
    d = 128
    rows = 2**31 // d + 40
    x = torch.from_numpy(np.memmap(tmp_path / "documents", np.float16, "w+", shape=(rows, d)))
    x[-60:] = unit(60, d, 2).half()
    ends = torch.tensor([0, rows - 60, rows - 10, rows])  # the second straddles the 2³¹st element, the third lies past it
    A = triton(unit(7, d, 1).half(), offsets(7), x, ends, torch.tensor([[0, 2], [0, 1]]))
    last = reference.subspace_attention(unit(7, d, 1).half(), offsets(7), x[-60:], torch.tensor([0, 50, 60]), torch.tensor([[0, 1], [0, 0]]))
    torch.testing.assert_close(A, last, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("tau", [0.0, MIN_TAU, 0.025, 0.1])
@pytest.mark.parametrize("d", [40, 128])
def test_gradients_are_those_of_the_definition(backend: str, tau: float, d: int) -> None:
    if backend == "cpu" and DEVICE.type != "cpu":
        pytest.skip("needs CPU tensors")
    query_lengths, lengths = [3, 0, 40], [0, 1, 17, 70]
    pairs = torch.tensor([[0, 1], [2, 3], [0, 3], [2, 2], [1, 2], [0, 0]], device=DEVICE)
    grad = torch.randn(3 * 3 + 2 * 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for function in (subspace_attention, reference.subspace_attention):
        q, x = unit(43, d, 1).requires_grad_(), unit(88, d, 2).requires_grad_()
        with use_backend(backend):
            function(q, offsets(*query_lengths), x, offsets(*lengths), pairs, tau).backward(grad)  # type: ignore[no-untyped-call]
        found.append((q.grad, x.grad))
    for ours, theirs in zip(*found):
        assert theirs is not None and theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-5 if DEVICE.type == "cpu" else 2e-3, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_gradients_of_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    q, x = unit(9, 64, 1).to(dtype).requires_grad_(), unit(40, 64, 2).to(dtype).requires_grad_()
    with use_backend("triton"):
        subspace_attention(q, offsets(9), x, offsets(40), pairs_of(1, 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None and x.grad is not None and q.grad.dtype == x.grad.dtype == dtype
    exact = [t.detach().float().requires_grad_() for t in (q, x)]
    reference.subspace_attention(exact[0], offsets(9), exact[1], offsets(40), pairs_of(1, 1)).sum().backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip((q, x), exact):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, atol=tolerance, rtol=tolerance)  # type: ignore[union-attr]


def test_gradients_of_a_query_against_int8() -> None:
    stored8, scales = reference.quantize(unit(40, 64, 2), torch.int8)
    found = []
    for backend in ("triton", "reference"):
        q8 = unit(9, 64, 1).requires_grad_()
        with use_backend(backend):
            subspace_attention(q8, offsets(9), stored8, offsets(40), pairs_of(1, 1), 0.1, scales).sum().backward()  # type: ignore[no-untyped-call]
        found.append(q8.grad)
    torch.testing.assert_close(*found, atol=5e-3, rtol=5e-3)


def test_the_gradient_of_equal_maxima_goes_to_the_first() -> None:
    x = unit(1, 16, 3)
    d = torch.cat([-x, x, x]).requires_grad_()
    with use_backend("triton"):
        subspace_attention(x, offsets(1), d, offsets(3), pairs_of(1, 1), 0.0).backward(torch.ones(1, device=DEVICE))  # type: ignore[no-untyped-call]
    assert d.grad is not None and d.grad.abs().sum(1).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("differentiable", [False, True])
def test_torch_sees_a_registered_operator(differentiable: bool) -> None:
    q, x = unit(5, 16, 1), unit(9, 16, 2)
    if differentiable:
        q, x = q.requires_grad_(), x.requires_grad_()
    arguments = q, offsets(5), x, offsets(2, 7), pairs_of(1, 2), 0.1, None
    torch.library.opcheck(torch.ops.rerank_kernels.subspace_attention.default, arguments)
    torch.library.opcheck(
        torch.ops.rerank_kernels.subspace_attention_backward.default, (torch.ones(10, device=DEVICE), q.detach(), offsets(5), x.detach(), *arguments[3:])
    )


def test_torch_compile_and_export_keep_it_whole() -> None:
    def scores(q: Tensor, x: Tensor) -> Tensor:
        return subspace_attention(q, offsets_q, x, offsets_d, pairs) * 2

    offsets_q, offsets_d, pairs = offsets(5), offsets(2, 7), pairs_of(1, 2)
    q, x = unit(5, 16, 1), unit(9, 16, 2)
    for dynamic in (False, True):
        compiled = torch.compile(scores, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(compiled(q, x), scores(q, x))
        torch._dynamo.reset()

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, q_offsets: Tensor, x: Tensor, d_offsets: Tensor, pairs: Tensor) -> Tensor:
            return subspace_attention(q, q_offsets, x, d_offsets, pairs)

    exported = torch.export.export(Module(), (q, offsets_q, x, offsets_d, pairs))
    assert "rerank_kernels.subspace_attention" in str(exported.graph)
    torch.testing.assert_close(exported.module()(q, offsets_q, x, offsets_d, pairs), scores(q, x) / 2)


GOOD: dict[str, Any] = {
    "q": unit(5, 8), "q_offsets": offsets(2, 3), "d": unit(6, 8), "d_offsets": offsets(6), "pairs": torch.tensor([[0, 0]], device=DEVICE), "tau": 0.1, "scales": None,
}  # fmt: skip
BAD: dict[str, list[Any]] = {
    "q": [unit(5, 8)[0], unit(5, 7), unit(5, 8).int(), unit(5, 8).double(), unit(5, 0)],
    "q_offsets": [offsets(2), offsets(5).int(), offsets(5)[None], offsets(5) + 1, torch.tensor([0, 4, 3, 5], device=DEVICE), offsets(6)],
    "d": [unit(6, 9), unit(6, 8).int(), reference.quantize(unit(6, 8), torch.int8)[0]],
    "d_offsets": [offsets(7), offsets(3, 2), torch.tensor([0, 6, 4, 6], device=DEVICE)],
    "pairs": [[[0]], [[2, 0]], [[-1, 0]], [[0, 1]], [[0, 0, 0]]],
    "tau": [-0.1, 0.001, 0.0129, float("nan"), float("inf")],
    "scales": [torch.ones(6, device=DEVICE)],
}


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
@pytest.mark.parametrize(("name", "place"), [(name, i) for name, values in BAD.items() for i in range(len(values))])
def test_what_does_not_fit_is_named_before_any_launch(backend: str, name: str, place: int) -> None:
    value = BAD[name][place]
    bad = torch.tensor(value, device=DEVICE) if name == "pairs" else value
    wanted = {"q": "q|d must be of 7 columns"} | ({"d": "scales"} if place == 2 else {})
    with use_backend(backend), pytest.raises(ValueError, match=rf"^({wanted.get(name, name)})"):
        subspace_attention(**GOOD | {name: bad})


def test_the_registered_operator_checks_as_the_function_does() -> None:
    """What was exported calls it directly."""
    for name in ("q", "d", "pairs", "q_offsets", "tau"):
        bad = torch.tensor(BAD[name][1], device=DEVICE) if name == "pairs" else BAD[name][1]
        with pytest.raises(ValueError):
            torch.ops.rerank_kernels.subspace_attention(*(GOOD | {name: bad}).values())
    with pytest.raises(ValueError, match=r"^tau must be a number"):
        subspace_attention(**GOOD | {"tau": "x"})


def test_a_second_derivative_is_refused_not_zero() -> None:
    q = unit(3, 8, 1).requires_grad_()
    A = subspace_attention(q, offsets(3), unit(5, 8, 2), offsets(5), pairs_of(1, 1))
    (first,) = torch.autograd.grad(A.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="subspace_attention_backward has no gradient"):
        first.sum().backward()  # type: ignore[no-untyped-call]


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pairs must be on .* not on meta"):
        subspace_attention(**GOOD | {"pairs": torch.zeros(1, 2, dtype=torch.int64, device="meta")})


def test_no_configuration_pads_the_width() -> None:
    for d in (64, 128, 384, 768, 1024):
        for dtype in ("fp16", "bf16", "fp32", "int8"):
            assert all(d % configuration(way, arch, dtype, d, 32).block_d == 0 for way in ("forward", "backward") for arch in ("sm_80", "sm_90", "sm_100"))
