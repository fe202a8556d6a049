"""The CPU path against the definitions, at every vector level that this processor has and in torch alone.

Both sum in fp32 in different orders, over the same rounded vectors, so the tolerance is the same 2e-6 for every dtype of
unit documents; int8 and fp8 are compared with the reference on the very numbers they hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rerank_kernels import MIN_TAU, cpu, reference
from tests.kernels import extremes

TOLERANCE = 2e-6
LEVELS = ["avx512", "avx2", "baseline", "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
FIXED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
nan = float("nan")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RERANK_KERNELS_SIMD", request.param)
    if cpu.implementation() != (request.param if request.param == "torch" else f"c-{request.param}"):
        pytest.skip(f"{cpu.implementation()} is the most that runs here")
    return str(request.param)


def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ABI", cpu.ABI + 1)
    cpu._library.cache_clear()
    try:
        assert cpu.implementation() == "torch"
    finally:
        cpu._library.cache_clear()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread: small products on two wait for each other wherever the machine has other work. Tests of sharing set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=-1)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def stored(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return reference.quantize(x, dtype) if dtype in reference.LARGEST else (x.to(dtype), None)


def every_pair(queries: int, documents: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(queries), torch.arange(documents))


def same_topk(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0], wanted[0], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
    assert found[1].dtype == torch.int64 and torch.equal(found[1] == -1, wanted[1] == -1)


@cache  # the same for every level
def wanted_topk(count: int, d: int, rows: int, k: int, metric: str, dtype: torch.dtype, segmented: bool) -> tuple[Tensor, Tensor]:
    x, scales = stored(unit(rows, d, 2), dtype)
    bounds = torch.tensor([0, *(n * (rows // count) for n in range(1, count)), rows]) if segmented and count else torch.tensor([0])
    return reference.similarity_topk(unit(count, d, 1), x, k, bounds if segmented else None, metric, scales)


def test_the_library_was_built_and_is_used() -> None:
    if cpu._library() is None:
        pytest.skip("no compiler when this was installed")
    assert cpu.implementation().startswith("c-")
    assert sys.platform != "linux" or cpu._pool() is not None


def test_a_level_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KERNELS_SIMD", "sse9")
    with pytest.raises(ValueError, match="baseline, avx2, avx512 or torch, not 'sse9'"):
        cpu.implementation()


def test_without_the_library_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert cpu.implementation() == "torch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 3, 64, 100, 128, 384, 1024])
def test_attention_is_the_reference(level: str, d: int, dtype: torch.dtype) -> None:
    query_lengths, lengths = [1, 0, 15, 16, 17, 33], [0, 1, 2, 5, 8, 15, 16, 17, 29, 300]
    q, (x, scales) = unit(sum(query_lengths), d, 1), stored(unit(sum(lengths), d, 2), dtype)
    pairs = every_pair(len(query_lengths), len(lengths))
    for tau in (0.0, MIN_TAU, 0.025, 0.1, 1.0):
        arguments = q, offsets(*query_lengths), x, offsets(*lengths), pairs, tau, scales
        torch.testing.assert_close(cpu.subspace_attention(*arguments), reference.subspace_attention(*arguments), atol=TOLERANCE, rtol=0)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 70), st.data())
@FIXED
def test_attention_of_any_lengths_and_any_pairs(level: str, query_lengths: list[int], lengths: list[int], d: int, data: st.DataObject) -> None:
    pair = st.tuples(st.integers(0, len(query_lengths) - 1), st.integers(0, len(lengths) - 1))
    pairs = torch.tensor(data.draw(st.lists(pair, max_size=9)), dtype=torch.int64).view(-1, 2)
    q, x, tau = unit(sum(query_lengths), d, 1), unit(sum(lengths), d, 2), data.draw(st.sampled_from([0.0, MIN_TAU, 0.025, 0.1, 1.0]))
    arguments = q, offsets(*query_lengths), x, offsets(*lengths), pairs, tau
    torch.testing.assert_close(cpu.subspace_attention(*arguments), reference.subspace_attention(*arguments), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("Lq", [1, 31, 64, 200, 512])
def test_attention_of_long_queries_half_precision_and_strides(level: str, Lq: int) -> None:
    q, x = unit(Lq, 48, 1).half(), unit(80, 96, 2)[:, ::2]
    arguments = q, offsets(Lq), x, offsets(50, 30), torch.tensor([[0, 1], [0, 0]]), 0.1
    torch.testing.assert_close(cpu.subspace_attention(*arguments), reference.subspace_attention(*arguments), atol=TOLERANCE, rtol=0)


def test_attention_survives_opposite_tokens_vectors_out_of_range_and_infinities(level: str) -> None:
    x = unit(1, 16, 3)
    opposite = cpu.subspace_attention(x, offsets(1), torch.cat([-x, -x, x]), offsets(2, 1), torch.tensor([[0, 0], [0, 1]]), MIN_TAU)
    torch.testing.assert_close(opposite, torch.tensor([-1.0, 1.0]), atol=TOLERANCE, rtol=0)
    for factor in (0.0, 1e-30, 1.5, 50.0, -50.0, 1e30, float("inf")):
        arguments = x, offsets(1), torch.cat([x, unit(20, 16, 4)]) * factor, offsets(21), torch.tensor([[0, 0]])
        for tau in (0.0, 0.1):
            found, wanted = cpu.subspace_attention(*arguments, tau), reference.subspace_attention(*arguments, tau)
            torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("tau", extremes.TAUS)
def test_attention_at_both_ends_is_a_softmax_in_fp64(level: str, tau: float) -> None:
    found = cpu.subspace_attention(*extremes.packed(extremes.documents()), tau)
    torch.testing.assert_close(found.double(), extremes.exact(extremes.documents(), tau)[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tau", [MIN_TAU, 0.0249])
def test_attention_of_a_million_tokens_stays_in_range(level: str, tau: float) -> None:
    arguments = extremes.packed(tuple(x.repeat(extremes.REPEATS, 1) for x in extremes.fours()))
    found = cpu.subspace_attention(*arguments, tau)
    # One long sum of weights in fp32 rounds by this much, at every tau alike.
    torch.testing.assert_close(found.double(), extremes.exact(extremes.fours(), tau)[0], atol=2e-2, rtol=0)


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_nan_stays_in_its_document_or_query_token(level: str, dtype: torch.dtype, tau: float) -> None:
    lengths = [3, 40, 17, 1]
    clean = unit(sum(lengths), 20, 1)
    for place in (0, 13, 39):
        x = clean.clone()
        x[3 + place, 7] = nan
        A = cpu.subspace_attention(unit(5, 20, 2), offsets(5), x.to(dtype), offsets(*lengths), every_pair(1, 4), tau).view(4, 5)
        assert A[1].isnan().all() and not A[[0, 2, 3]].isnan().any()
    q = unit(5, 20, 2)
    q[3, 0] = nan
    A = cpu.subspace_attention(q, offsets(5), clean.to(dtype), offsets(*lengths), every_pair(1, 4), tau).view(4, 5)
    assert A[:, 3].isnan().all() and not A[:, [0, 1, 2, 4]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_every_value_of_a_small_dtype_widens_exactly(level: str, dtype: torch.dtype) -> None:
    integers = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = integers.view(dtype)[:, None]
    A = cpu.subspace_attention(torch.ones(1, 1), offsets(1), x, torch.arange(len(x) + 1), every_pair(1, len(x)), 0.0)
    torch.testing.assert_close(A, x[:, 0].float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 3, 4, 33])
@pytest.mark.parametrize("d", [1, 77, 384])
def test_equal_rows_have_bitwise_equal_values_at_any_place(level: str, d: int, count: int) -> None:
    if level == "torch":
        pytest.skip("a matrix product promises no such thing")
    row, places = unit(1, d, 3), [0, 1, 5, 13, 14, 15, 127, 255, 256, 300, 598]
    x = unit(599, d, 4) * 0.01
    x[places] = row
    for dtype in (torch.float32, torch.float16):
        values, index = cpu.similarity_topk(row.repeat(count, 1), x.to(dtype), len(places), None, "dot")
        assert index.tolist() == [places] * count and (values == values[0, 0]).all()
    lengths = [1, 5, 14, 15, 100, 464]  # each document ends with the row
    x[offsets(*lengths)[1:] - 1] = row
    A = cpu.subspace_attention(row.repeat(count, 1), offsets(count), x, offsets(*lengths), every_pair(1, len(lengths)), 0.0)
    assert len(set(A.tolist())) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("count", [0, 1, 4, 140])
def test_topk_is_the_reference(level: str, count: int, metric: str, dtype: torch.dtype) -> None:
    for d, rows in ((1, 5), (100, 400), (129, 33)):
        queries, (x, scales) = unit(count, d, 1), stored(unit(rows, d, 2), dtype)
        bounds = torch.tensor([0, *(n * (rows // count) for n in range(1, count)), rows]) if count else torch.tensor([0])
        for k, segments in ((1, None), (10, None), (rows, None), (7, bounds)):
            same_topk(cpu.similarity_topk(queries, x, k, segments, metric, scales), wanted_topk(count, d, rows, k, metric, dtype, segments is not None))


@given(st.lists(st.sampled_from([nan, -torch.inf, torch.inf, -2.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=70), st.integers(1, 80), st.integers(1, 6))
@FIXED
def test_ties_infinities_and_nan_have_one_order(level: str, values: list[float], k: int, count: int) -> None:
    found, index = cpu.similarity_topk(torch.ones(count, 1), torch.tensor(values)[:, None], k, None, "dot")
    wanted = sorted(range(len(values)), key=lambda i: (values[i] != values[i], -values[i] if values[i] == values[i] else 0, i))[:k]
    for b in range(count):
        assert index[b].tolist() == wanted + [-1] * (k - len(wanted))
        torch.testing.assert_close(found[b], torch.tensor([*(values[i] for i in wanted), *[-torch.inf] * (k - len(wanted))]), equal_nan=True)


@pytest.mark.parametrize("sizes", [[0, 40000, 0, 3], [20000, 17000], [300] * 40, [0, 0]])
def test_segments_long_short_and_empty(level: str, sizes: list[int]) -> None:
    torch.set_num_threads(2)
    queries, x, bounds = unit(len(sizes), 8, 1), unit(sum(sizes), 8, 2), offsets(*sizes)
    same_topk(cpu.similarity_topk(queries, x, 50, bounds, "cosine"), reference.similarity_topk(queries, x, 50, bounds, "cosine"))


@pytest.mark.parametrize("count", [1, 20])
def test_topk_over_many_documents_keeps_the_best_in_any_order(level: str, count: int) -> None:
    torch.set_num_threads(3)
    # 0, 1, 2, … rising, falling and shuffled: whole numbers are exact in every order of summation, and each stands twice.
    rising = (torch.arange(30000) // 2).float()
    for order in (torch.arange(30000), torch.arange(30000).flip(0), torch.randperm(30000, generator=torch.Generator().manual_seed(0))):
        x = rising[order]
        values, index = cpu.similarity_topk(torch.ones(count, 1), x[:, None], 100, None, "dot")
        wanted = x.sort(descending=True, stable=True)
        assert torch.equal(values, wanted.values[:100].expand(count, -1)) and torch.equal(index, wanted.indices[:100].expand(count, -1))


def test_zero_vectors_and_collinear_ones(level: str) -> None:
    documents = torch.tensor([[1.0, 0], [0, 2], [1, 0], [0, 0], [3, 0], [1e-30, 0]])
    for count in (1, 5):
        values, index = cpu.similarity_topk(torch.tensor([[2.0, 0]]).expand(count, -1), documents, 6, None, "cosine")
        assert index[0].tolist() == [0, 2, 4, 5, 1, 3] and values[0, :3].tolist() == [1.0] * 3
        assert not cpu.similarity_topk(torch.zeros(count, 2), documents, 6, None, "cosine")[0].any()


def test_results_do_not_depend_on_the_number_of_threads(level: str) -> None:
    q, x, bounds = unit(40, 64, 1), unit(9000, 64, 2), torch.arange(0, 9001, 90)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        A = cpu.subspace_attention(q, offsets(40), x, bounds, every_pair(1, 100), 0.1)
        found.append((A, *cpu.similarity_topk(q, x, 30), *cpu.similarity_topk(q[:1], x, 30)))
    for other in found[1:]:
        for one, two in zip(found[0], other):
            assert torch.equal(one, two) if level != "torch" else torch.allclose(one.float(), two.float(), atol=TOLERANCE)


def test_no_second_pool_of_threads_appears() -> None:
    if not os.path.exists("/proc/self/task") or cpu._library() is None:
        pytest.skip("counts threads in /proc")
    code = (
        "import os, torch; from rerank_kernels import cpu; torch.set_num_threads(3); x = torch.randn(4000, 64);"
        "x @ x.T; (x + 1).sum(); torch.randn(1000000).exp(); before = len(os.listdir('/proc/self/task'));"
        "cpu.similarity_topk(x[:9], x, 5); cpu.similarity_topk(x[:1], x, 5); print(before, len(os.listdir('/proc/self/task')))"
    )
    before, after = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert before == after and int(before) >= 3
