"""The kernel against the definition, in the interpreter or on a GPU. Tolerance 2e-4: z divides by a small std, and fp32 rounding grows with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rerank_kernels import contrast_score, reference, use_backend
from tests.conftest import DEVICE, offsets, unit

TOLERANCE = 2e-4
BACKENDS = ["auto", "triton"]


def values(count: int, seed: int) -> Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(DEVICE)


def pools_of(shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, its offsets, the pools and a cosine a pair, for pools of (pairs, query tokens)."""
    lengths = [Lq for K, Lq in shapes for _ in range(K)]
    return values(sum(lengths), 1), offsets(*lengths), offsets(*(K for K, _ in shapes)), values(len(lengths), 2)


@given(st.lists(st.tuples(st.integers(0, 70), st.sampled_from([0, 1, 5, 33])), min_size=1, max_size=4), st.sampled_from([0.0, 0.25]), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_the_kernel_is_the_definition(shapes: list[tuple[int, int]], gamma: float, count: int) -> None:
    A, ends, pools, cosine = pools_of(shapes)
    terms, e = [(values(len(cosine), 3 + i), 0.5 + i) for i in range(count)], unit(len(cosine), 20, 7)
    with use_backend("triton"):
        found = contrast_score(A, ends, pools, cosine, alpha=1.5, terms=terms, gamma=gamma, embeddings=e)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference.contrast_score(A, ends, pools, cosine, 1.5, terms, gamma, e), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["A", "cosine", "term", "embeddings"])
def test_a_nan_is_left_out_of_its_pools_statistics(what: str, backend: str) -> None:
    A, ends, pools, cosine = pools_of([(7, 4), (5, 3)])
    term, e = values(12, 3), unit(12, 6, 4)
    {"A": A, "cosine": cosine, "term": term, "embeddings": e.view(-1)}[what][{"A": 9, "cosine": 2, "term": 2, "embeddings": 15}[what]] = torch.nan
    with use_backend(backend):
        found = contrast_score(A, ends, pools, cosine, terms=[(term, 0.5)], gamma=0.25, embeddings=e)
        assert found.isnan().nonzero().flatten().tolist() == [2]
        kept = torch.arange(12, device=DEVICE) != 2
        without, fewer = torch.cat([A[:8], A[12:]]), torch.cat([ends[:3], ends[4:] - 4])
        alone = contrast_score(without, fewer, offsets(6, 5), cosine[kept], terms=[(term[kept], 0.5)], gamma=0.25, embeddings=e[kept])
    torch.testing.assert_close(found[kept], alone, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_of_nothing_but_nan_is_nan(backend: str) -> None:
    A, ends, pools, cosine = pools_of([(3, 4), (5, 3)])
    cosine[:3] = torch.nan
    with use_backend(backend):
        assert contrast_score(A, ends, pools, cosine).isnan().tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_documents_have_equal_scores_and_flat_pools_are_zero(backend: str) -> None:
    with use_backend(backend):
        assert contrast_score(torch.full((12,), 0.3, device=DEVICE), offsets(4, 4, 4), offsets(3), torch.full((3,), 0.7, device=DEVICE)).tolist() == [0.0] * 3
        A = values(4, 1).repeat(3)
        A[8:] *= 0.5
        found = contrast_score(A, offsets(4, 4, 4), offsets(3), torch.tensor([0.5, 0.5, 0.2], device=DEVICE))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("shape", [(300, 512), (4097, 2), (3, 1025)])
def test_large_pools_and_long_queries(shape: tuple[int, int]) -> None:
    A, ends, pools, cosine = pools_of([shape])
    with use_backend("triton"):
        torch.testing.assert_close(contrast_score(A, ends, pools, cosine), reference.contrast_score(A, ends, pools, cosine), atol=TOLERANCE, rtol=TOLERANCE)


def test_torch_sees_a_registered_operator() -> None:
    A, ends, pools, cosine = pools_of([(3, 4), (2, 5)])
    e = unit(5, 6)
    torch.library.opcheck(torch.ops.rerank_kernels.contrast_score.default, (A, ends, pools, cosine[None], [1.0], 2.0, 0.25, e))
    compiled = torch.compile(lambda A, cosine: contrast_score(A, ends, pools, cosine, terms=[(cosine, 0.5)]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A, cosine), contrast_score(A, ends, pools, cosine, terms=[(cosine, 0.5)]))


A, ENDS, POOLS, COSINE = pools_of([(3, 4), (2, 5)])


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"A": A.half()}, "^A must be a vector of float32"),
        ({"A": A[:-1]}, "^a_offsets must rise from 0 to 21"),
        ({"a_offsets": ENDS[:-1]}, "^a_offsets must be of length 6"),
        ({"a_offsets": ENDS.flip(0)}, "^a_offsets must rise"),
        ({"pools": offsets(3)}, "^pools must rise from 0 to 5"),
        ({"pools": torch.tensor([0, 6, 5], device=DEVICE)}, "^pools must rise"),
        ({"pools": offsets(5)}, "^a_offsets must give all pairs of a pool as many values: pair 3 has 5, its pool's first 4"),
        ({"cosine": COSINE[None]}, "^cosine must be a vector"),
        ({"terms": [(COSINE[:3], 1.0)]}, r"^terms\[0\] must be a vector"),
        ({"gamma": 1.0}, "^embeddings must be given with gamma"),
        ({"gamma": -1.0}, "^gamma must be at least 0"),
        ({"embeddings": unit(4, 6)}, "^embeddings must be of 5 rows"),
    ],
)
def test_what_does_not_fit_is_named_before_any_launch(bad: dict[str, object], message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=message):
        contrast_score(**{"A": A, "a_offsets": ENDS, "pools": POOLS, "cosine": COSINE} | bad)  # type: ignore[arg-type]
