"""The Triton kernels against the definition, in the interpreter or on a GPU. Tolerances as in test_subspace_attention."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rerank_kernels import reference, similarity_topk, use_backend
from tests.conftest import DEVICE, offsets, unit
from tests.kernels.test_subspace_attention import DTYPES, TOLERANCE, stored

nan = float("nan")


def triton(*arguments: object) -> tuple[Tensor, Tensor]:
    with use_backend("triton"):
        return similarity_topk(*arguments)  # type: ignore[arg-type]


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """The same values, and the same indices wherever no neighbour's value is within rounding."""
    torch.testing.assert_close(found[0], wanted[0], atol=2 * TOLERANCE, rtol=TOLERANCE, equal_nan=True)
    gap = torch.nn.functional.pad((wanted[0].diff().abs() > 10 * TOLERANCE) | wanted[0].diff().isnan(), (1, 1), value=True)
    alone = gap[:, :-1] & gap[:, 1:]
    alone[:, -1] = False  # the last may have a rival that is not among the k
    assert found[1].dtype == torch.int64 and torch.equal(found[1][alone], wanted[1][alone])
    assert torch.equal(found[1] == -1, wanted[1] == -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 100, 128, 384, 1024])
def test_the_kernel_is_the_definition(d: int, dtype: torch.dtype) -> None:
    B, N = 3, 150
    queries, (x, scales) = unit(B, d, 1) * 3, stored(unit(N, d, 2) * 0.5, dtype)
    rounded = torch.float16 if scales is not None else dtype
    segments = torch.tensor([0, 15, 15, N], device=DEVICE)
    for k, bounds, metric in ((1, None, "dot"), (100, None, "cosine"), (17, segments, "cosine"), (100, segments, "dot")):
        # The kernel rounds the unit query: so that the definition sees the very same numbers, it gets it as a dot product's.
        if metric == "cosine":
            q = torch.nn.functional.normalize(queries, dim=-1).to(rounded)
            documents = torch.nn.functional.normalize(reference.dequantize(x, scales), dim=-1)
            wanted = reference.similarity_topk(q, documents, k, bounds, "dot")
        else:
            wanted = reference.similarity_topk(queries.to(rounded), x, k, bounds, "dot", scales)
        same(triton(queries.to(rounded) if metric == "dot" else queries, x, k, bounds, metric, scales), wanted)


@given(st.integers(1, 20), st.sampled_from([0, 1, 15, 16, 17, 64, 65, 130]), st.integers(1, 70), st.sampled_from(["cosine", "dot"]), st.data())
@settings(max_examples=25, deadline=None)
def test_any_queries_documents_and_width(B: int, N: int, d: int, metric: str, data: st.DataObject) -> None:
    """Segmented: every query has N documents or fewer of its own."""
    sizes = data.draw(st.lists(st.integers(0, N), min_size=B, max_size=B))
    bounds = offsets(*sizes[:-1], max(sizes[-1], 1))
    queries, x = unit(B, d, 1), unit(int(bounds[-1]), d, 2)
    k = min(data.draw(st.integers(1, 100)), len(x))
    same(triton(queries, x, k, bounds, metric), reference.similarity_topk(queries, x, k, bounds, metric))
    same(triton(queries, x, k, None, metric), reference.similarity_topk(queries, x, k, None, metric))


@given(st.lists(st.sampled_from([nan, -torch.inf, torch.inf, -2.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=140), st.integers(1, 140))
@settings(max_examples=15, deadline=None)
def test_ties_infinities_and_nan_have_one_order(values: list[float], k: int) -> None:
    k = min(k, len(values))
    with use_backend("triton"):
        found, index = similarity_topk(torch.ones(2, 1, device=DEVICE), torch.tensor(values, device=DEVICE)[:, None], k, None, "dot")
    wanted = sorted(range(len(values)), key=lambda i: (values[i] != values[i], -values[i] if values[i] == values[i] else 0, i))[:k]
    assert index.tolist() == [wanted] * 2
    torch.testing.assert_close(found[1].cpu(), torch.tensor([values[i] for i in wanted]), equal_nan=True)


@pytest.mark.parametrize("k", [1, 64, 65, 128, 256, 257, 600])
@pytest.mark.parametrize("most", [1, 2, 32])
def test_many_splits_keep_the_best_in_any_order(k: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("rerank_kernels.similarity_topk"), "MOST_SPLITS", most)
    rising = (torch.arange(700) // 2).float()
    for order in (torch.arange(700), torch.randperm(700, generator=torch.Generator().manual_seed(0))):
        x = rising[order].to(DEVICE)
        for B in (1, 3):
            values, index = triton(torch.ones(B, 1, device=DEVICE), x[:, None], k, None, "dot")
            wanted = x.sort(descending=True, stable=True)
            for b in range(B):
                assert torch.equal(values[b], wanted.values[:k]) and torch.equal(index[b], wanted.indices[:k])


def test_zero_vectors_have_cosine_zero() -> None:
    documents = torch.tensor([[1.0, 0], [0, 2], [1, 0], [0, 0], [3, 0], [1e-15, 0]], device=DEVICE)
    values, index = triton(torch.tensor([[2.0, 0]], device=DEVICE), documents, 6, None, "cosine")
    assert index[0].tolist() == [0, 2, 4, 5, 1, 3]
    torch.testing.assert_close(values[0].cpu(), torch.tensor([1.0, 1, 1, 1e-3, 0, 0]), atol=1e-6, rtol=0)
    assert not triton(torch.zeros(1, 2, device=DEVICE), documents, 6, None, "cosine")[0].any()


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_nan_stays_in_its_document(backend: str) -> None:
    if backend == "cpu" and DEVICE.type != "cpu":
        pytest.skip("needs CPU tensors")
    x = unit(30, 16, 1)
    x[7, 3] = nan
    with use_backend(backend):
        for metric in ("cosine", "dot"):
            values, index = similarity_topk(unit(4, 16, 2), x, 30, None, metric)
            assert index[:, -1].tolist() == [7] * 4 and values[:, -1].isnan().all() and not values[:, :-1].isnan().any()


@pytest.mark.parametrize("segments", [None, offsets(4, 6)])
def test_torch_sees_a_registered_operator(segments: Tensor | None) -> None:
    arguments = unit(2, 16, 1), unit(10, 16, 2), 3, segments, "cosine", None
    torch.library.opcheck(torch.ops.rerank_kernels.similarity_topk.default, arguments)
    for dynamic in (False, True):
        compiled = torch.compile(similarity_topk, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for ours, theirs in zip(compiled(*arguments), similarity_topk(*arguments)):
            torch.testing.assert_close(ours, theirs)
        torch._dynamo.reset()


def test_a_gradient_is_refused_not_lost() -> None:
    values, _ = similarity_topk(unit(2, 8).requires_grad_(), unit(6, 8), 2)
    with pytest.raises(RuntimeError, match="similarity_topk has no gradient"):
        values.sum().backward()  # type: ignore[no-untyped-call]


def test_the_registered_operator_checks_as_the_function_does() -> None:
    for name in ("queries", "documents", "k", "segments", "scales"):
        with pytest.raises(ValueError, match=f"^{name} must"):
            torch.ops.rerank_kernels.similarity_topk(*(GOOD | {name: BAD[name][0]}).values())


GOOD: dict[str, Any] = {"queries": unit(2, 8), "documents": unit(6, 8), "k": 2, "segments": None, "metric": "cosine", "scales": None}
BAD: dict[str, list[Any]] = {
    "queries": [unit(2, 8)[0], unit(2, 8).int(), unit(2, 0)],
    "documents": [unit(6, 7), unit(6, 8).double(), unit(6, 8)[0]],
    "k": [0, -1, 7, 2.0, None],
    "segments": [offsets(6), offsets(2, 4).int(), torch.tensor([0, 7, 6], device=DEVICE), torch.tensor([0, 2, 5], device=DEVICE)],
    "metric": ["euclid"],
    "scales": [torch.ones(6, device=DEVICE)],
}


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
@pytest.mark.parametrize(("name", "place"), [(name, i) for name, values in BAD.items() for i in range(len(values))])
def test_what_does_not_fit_is_named_before_any_launch(backend: str, name: str, place: int) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=rf"^{name} must"):
        similarity_topk(**GOOD | {name: BAD[name][place]})


def test_scales_come_with_quantised_documents_only() -> None:
    x, scales = reference.quantize(unit(6, 8), torch.int8)
    for wrong in (None, scales[:5], scales.half()):
        with pytest.raises(ValueError, match=r"^scales must"):
            similarity_topk(unit(2, 8), x, 2, scales=wrong)
