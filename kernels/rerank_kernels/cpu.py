"""The operators on the CPU: a small C library where the install built one, chunks of matrix products in torch where it did not.

Arguments are taken as checked: `reference.py` says what they are. The environment variable RERANK_KERNELS_SIMD holds the library to
a lower level than the processor has: avx512, avx2, baseline, or torch for no library at all.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from .reference import dequantize, softmax_shift

LEVELS = ("baseline", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
ABI = 3  # the version of the C library's functions and their arguments
# Rows in one step of the torch path: their product with 64 queries stays in the cache.
CHUNK = 8192
# The library keeps a document's index in 32 bits.
MAX_DOCUMENTS = 2**32
_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@cache
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                if library.rerank_abi() != ABI:
                    return None
            except (OSError, AttributeError):  # built for another machine, or from other sources than these
                return None
            library.rerank_layout.argtypes, library.rerank_layout.restype = [_P, _N, _N, _P, _N, _N, _P, _N, _P], _N
            library.rerank_attention.argtypes = [_I, _P, _N, _P, _P, _N, _P, _I, _P, _N, _P, _P, _P, _N, ctypes.c_float, ctypes.c_float, _P]
            library.rerank_packed.argtypes = [_I, _P, _N, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _N, _P]
            library.rerank_rows.argtypes, library.rerank_rows.restype = [_I, _P, _N, _P, _P, _P, _P, _P, _N, _N, ctypes.c_float], None
            library.rerank_topk.argtypes = [_I, _P, _N, _P, _N, _P, _I, _N, _N, _P, _P, _N, _I, _P, _P]
            return library
    return None


@cache
def _pool() -> ctypes.c_void_p | None:
    """OpenMP's entry in the runtime that torch has loaded, so that its threads do this work too and none compete with them."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # without it: one thread
        return None


def _level() -> int:
    """Which of the library's levels to use; −1 for torch."""
    library, wanted = _library(), os.environ.get("RERANK_KERNELS_SIMD") or LEVELS[-1]
    if wanted not in (*LEVELS, "torch"):
        raise ValueError(f"RERANK_KERNELS_SIMD must be one of {', '.join(LEVELS)} or torch, not {wanted!r}")
    return -1 if library is None or wanted == "torch" else min(int(library.rerank_level()), LEVELS.index(wanted))


def implementation() -> str:
    """What runs here: "c-avx512", "c-avx2", "c-baseline" or "torch"."""
    level = _level()
    return "torch" if level < 0 else f"c-{LEVELS[level]}"


def native_attention(
    q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float = 0.1, scales: Tensor | None = None
) -> Tensor | None:
    """`subspace_attention` by the C library, which checks offsets and pairs itself. None without the library, or where they do not fit.

    Raises:
        MemoryError: no memory for a thread's working space.
    """
    level, library = _level(), _library()
    if level < 0 or library is None:
        return None
    q, d, pairs = _plain(q.float()), _plain(d), pairs.contiguous()
    q_offsets, d_offsets = q_offsets.contiguous(), d_offsets.contiguous()
    scales = None if scales is None else scales.contiguous()
    (nnz, dim), count, starts = d.shape, len(pairs), torch.empty(len(pairs) + 1, dtype=torch.int64, device="cpu")
    q_at, d_at = _integers("q_offsets", q_offsets), _integers("d_offsets", d_offsets)
    pairs_at, starts_at = _integers("pairs", pairs, 2 * count), _integers("starts", starts)
    longest = library.rerank_layout(q_at, len(q_offsets) - 1, len(q), d_at, len(d_offsets) - 1, nnz, pairs_at, count, starts_at)
    if longest < 0:
        return None
    out = torch.empty(int(starts[-1]), dtype=torch.float32, device="cpu")
    failed = len(out) and library.rerank_attention(
        level, _pool(), torch.get_num_threads(), _floats("q", q, len(q) * dim), q_at, longest, _address("d", d, d.dtype, nnz * dim), DTYPES[d.dtype],
        d_at, dim, _floats("scales", scales, nnz), pairs_at, starts_at, count, tau, softmax_shift(tau), _floats("out", out),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the working space of subspace_attention")
    return out


def torch_attention(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float = 0.1, scales: Tensor | None = None) -> Tensor:
    """`subspace_attention` in torch alone: each query's documents, their tokens in chunks, one product a chunk, then maximum or sums by document."""
    q, lengths, m, out = q.float(), d_offsets.diff(), softmax_shift(tau), [torch.zeros(0, dtype=torch.float32, device="cpu")]
    queries, counts = torch.unique_consecutive(pairs[:, 0], return_counts=True)
    for query, documents in zip(queries.tolist(), pairs[:, 1].split_with_sizes(counts.tolist())):
        x = q[q_offsets[query] : q_offsets[query + 1]]
        sizes = lengths[documents]
        owner = torch.repeat_interleave(torch.arange(len(documents), dtype=torch.int64, device="cpu"), sizes)
        rows = torch.arange(len(owner), dtype=torch.int64, device="cpu") + (d_offsets[documents] + sizes - sizes.cumsum(0))[owner]
        first = torch.full((len(documents), len(x)), -torch.inf if tau == 0 else 0.0, dtype=torch.float32, device="cpu")
        second = torch.zeros_like(first)
        for start in range(0, len(rows), CHUNK):
            row, text = rows[start : start + CHUNK], owner[start : start + CHUNK]
            s = dequantize(d[row], None if scales is None else scales[row]) @ x.T
            if tau == 0:
                first.scatter_reduce_(0, text[:, None].expand_as(s), s, "amax")
            else:
                weight = torch.exp((s - m) / tau)
                first.index_add_(0, text, weight * s)
                second.index_add_(0, text, weight)
        values = first if tau == 0 else first / second
        values[sizes == 0] = -1.0
        out.append(values.flatten())
    return torch.cat(out)


def subspace_attention(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float = 0.1, scales: Tensor | None = None) -> Tensor:
    """As `reference.subspace_attention`, for checked arguments on the CPU.

    Args:
        q: packed query tokens, nnz_q × r, any float type; offsets and pairs as there.
        d: packed document tokens, nnz_d × r: fp32, fp16, bf16, int8 or float8_e4m3fn.
        scales: nnz_d, fp32: what each document token is multiplied by.

    Returns:
        fp32 of length Σ_p Lq(p). A NaN in a document makes that document's values NaN, one in a query token that token's.

    Raises:
        MemoryError: no memory for a thread's working space.
    """
    found = native_attention(q, q_offsets, d, d_offsets, pairs, tau, scales)
    return torch_attention(q, q_offsets, d, d_offsets, pairs, tau, scales) if found is None else found


def native_packed_attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, heads: int, q_bias: Tensor | None = None) -> Tensor | None:
    """`packed_attention` in fp32 by the C library, which checks offsets itself. None without the library, for other types, or where offsets do not fit.

    Raises:
        MemoryError: no memory for a thread's working space.
    """
    level, library = _level(), _library()
    if level < 0 or library is None or q.dtype != torch.float32 or _needs_gradient(q, k, v, q_bias):
        return None
    q, k, v = [x if x.stride(1) == 1 else x.contiguous() for x in (q.resolve_neg(), k.resolve_neg(), v.resolve_neg())]
    if k.stride(0) != v.stride(0):
        k, v = k.contiguous(), v.contiguous()
    q_offsets, k_offsets, out = q_offsets.contiguous(), k_offsets.contiguous(), torch.zeros(q.shape, dtype=torch.float32, device="cpu")
    q_bias = None if q_bias is None else q_bias.contiguous()
    (rows, width), texts = q.shape, len(q_offsets) - 1
    failed = library.rerank_packed(
        level, _pool(), torch.get_num_threads(), _rows("q", q, width), _rows("k", k, width), _rows("v", v, width), _floats("q_bias", q_bias, width),
        _integers("q_offsets", q_offsets), _integers("k_offsets", k_offsets, max(1, texts + 1)), texts, rows, min(len(k), len(v)), heads, width // heads,
        q.stride(0), k.stride(0), _floats("out", out),
    )  # fmt: skip
    if failed == 1:
        raise MemoryError("no memory for the working space of packed_attention")
    return None if failed else out


def torch_packed_attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, heads: int, q_bias: Tensor | None = None) -> Tensor:
    """`packed_attention` in torch alone: its fused attention, text by text."""
    q = q if q_bias is None else q + q_bias
    out = torch.zeros(q.shape, dtype=q.dtype, device="cpu")
    for a, b, c, d in zip(q_offsets.tolist(), q_offsets[1:].tolist(), k_offsets.tolist(), k_offsets[1:].tolist()):
        if a < b and c < d:
            Q, K, V = (x.view(-1, heads, x.shape[1] // heads).transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            out[a:b] = scaled_dot_product_attention(Q, K, V)[0].transpose(0, 1).flatten(1)
    return out


def native_rows(x: Tensor, bias: Tensor | None, residual: Tensor | None = None, norm: tuple[Tensor, Tensor, float] | None = None) -> bool:
    """The passes of row_passes.py by the C library, in place. False without the library, or where x is not whole rows of fp32 without gradient."""
    level, library = _level(), _library()
    weight, shift, eps = norm or (None, None, 0.0)
    if level < 0 or library is None or (bias if norm is None else residual) is None or _needs_gradient(x, bias, residual, weight, shift):
        return False
    for t in (x, bias, residual, weight, shift):
        if t is not None and (t.dtype != torch.float32 or not t.is_contiguous() or t.is_neg()):
            return False
    rows, width = x.shape
    library.rerank_rows(
        level, _pool(), torch.get_num_threads(), _floats("x", x), _floats("bias", bias, width), _floats("residual", residual, rows * width),
        _floats("weight", weight, width), _floats("shift", shift, width), rows, width, eps,
    )  # fmt: skip
    return True


def similarity_topk(
    queries: Tensor, documents: Tensor, k: int, segments: Tensor | None = None, metric: str = "cosine", scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.similarity_topk`, for checked arguments on the CPU; the B × N similarities are never held at once.

    Args:
        queries: B × d, any float type; k, segments and metric as there.
        documents: N × d: fp32, fp16, bf16, int8 or float8_e4m3fn.
        scales: N, fp32: what each document is multiplied by.

    Returns:
        values (B × k, fp32) and indices (B × k, int64). NaN ranks below every number.

    Raises:
        MemoryError: no memory for a thread's results.
    """
    level, library = _level(), _library()
    if level < 0 or library is None or len(documents) >= MAX_DOCUMENTS:
        return chunked_topk(queries, documents, k, segments, metric, scales)
    queries, documents = _plain(queries.float()), _plain(documents)
    scales = None if scales is None else scales.float().contiguous()
    segments = None if segments is None else segments.contiguous()
    if metric == "cosine":
        queries = normalize(queries, dim=-1)
    count, (rows, dim) = len(queries), documents.shape
    values, indices = torch.empty(count, k, dtype=torch.float32, device="cpu"), torch.empty(count, k, dtype=torch.int64, device="cpu")
    failed = library.rerank_topk(
        level, _pool(), torch.get_num_threads(), _floats("queries", queries, count * dim), count,
        _address("documents", documents, documents.dtype, rows * dim), DTYPES[documents.dtype], rows, dim, _floats("scales", scales, rows),
        None if segments is None else _integers("segments", segments, count + 1), k, metric == "cosine", _floats("values", values), _integers("indices", indices, count * k),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the results of similarity_topk")
    return values, indices


def _plain(x: Tensor) -> Tensor:
    return (x if x.dtype in DTYPES else x.float()).contiguous().resolve_neg()


def _address(name: str, x: Tensor, dtype: torch.dtype, count: int, width: int = 0) -> int:
    """The address of a tensor's first element, for the C library, which reads and writes wherever it is told to.

    Args:
        name: the tensor's name in the message.
        x: elements one after another; with a width, rows that may be further apart.
        dtype: what the library takes there.
        count: elements that it will touch at least; 0 with a width.
        width: of a row whose elements stand one after another.

    Raises:
        ValueError: another dtype or place than the library takes, or fewer elements.
    """
    good = (x.stride(1) == 1 or width == 1) and x.shape[1] >= width if width else x.is_contiguous() and x.numel() >= count
    if x.dtype != dtype or x.device.type != "cpu" or not good or x.is_neg():
        wanted = f"{dtype}, {f'rows of {width}' if width else f'{count} or more in a row'}, on the CPU"
        raise ValueError(f"{name} is not what the C library takes ({wanted}): {x.dtype} of shape {tuple(x.shape)}, strides {x.stride()}, on {x.device}")
    return x.data_ptr()


# The next two are called a hundred times a query. Each accepts a right tensor by itself, and leaves only a wrong one to _address.
def _integers(name: str, x: Tensor, count: int = 1) -> int:
    if x.dtype == torch.int64 and x.is_cpu and x.is_contiguous() and x.numel() >= count and not x.is_neg():
        return x.data_ptr()
    return _address(name, x, torch.int64, count)


def _floats(name: str, x: Tensor | None, count: int = 0) -> int | None:
    if x is None:
        return None
    if x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and x.numel() >= count and not x.is_neg():
        return x.data_ptr()
    return _address(name, x, torch.float32, count)


def _rows(name: str, x: Tensor, width: int) -> int:
    return _address(name, x, torch.float32, 0, width)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        return any(x is not None and x.requires_grad for x in tensors)
    return False


def chunked_topk(
    queries: Tensor, documents: Tensor, k: int, segments: Tensor | None = None, metric: str = "cosine", scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`similarity_topk` in torch alone, on any device and for any k: products of 8,192 documents at a time, the best of each joined to those before."""
    if segments is not None:
        bounds = list(zip(segments[:-1].tolist(), segments[1:].tolist()))
        parts = [chunked_topk(queries[n : n + 1], documents[a:b], k, None, metric, None if scales is None else scales[a:b]) for n, (a, b) in enumerate(bounds)]
        if parts:
            return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])
    queries = normalize(queries.float(), dim=-1) if metric == "cosine" else queries.float()
    values, indices = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(documents), CHUNK):
        block = dequantize(documents[start : start + CHUNK], None if scales is None else scales[start : start + CHUNK])
        values = torch.cat([values, queries @ (normalize(block, dim=-1) if metric == "cosine" else block).T], 1)
        places = torch.arange(values.shape[1], dtype=torch.int64, device=queries.device)
        indices = torch.cat([indices, (places[indices.shape[1] :] + (start - indices.shape[1])).expand(len(queries), -1)], 1)
        # Distinct integers that order as (value, −place) do, since topk itself leaves open which of equal values it takes.
        bits = (values + 0.0).view(torch.int32).long()
        rank = torch.where(values.isnan(), -(2**31), torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
        best = (rank * 2**31 - places).topk(min(k, values.shape[1]), 1).indices
        values, indices = values.gather(1, best), indices.gather(1, best)
    missing = k - values.shape[1]
    return pad(values, (0, missing), value=-torch.inf), pad(indices, (0, missing), value=-1)
