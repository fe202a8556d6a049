"""Similarity of queries with documents and the k best of each query in one pass: the B × N matrix is never in memory.

s_bn = q_b · d_n (dot), or q_b · d_n / (‖q_b‖ ‖d_n‖), which is 0 for a zero vector (cosine). Equal values stand in ascending
index; a NaN stands after −inf; a query with fewer than k documents is padded with value −inf and index −1.

A value and its index travel as one int64 key whose order is the order of the result: the float's bits made monotone in
the upper half, the index counted down in the lower. Each program sorts its tiles' keys into the k best so far; a second
kernel merges what the programs found.
"""

# The arguments of Triton's functions have no types that Python knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import backend, checks, cpu, reference
from .backend import on_device, operator, tl, triton
from .configs import INTERPRETED, NAMES, POINTERS, WIDTHS, Config, Variant, architecture, key, tuned
from .samples import documents, seeded, unit

OP = "similarity_topk"
METRICS = ("cosine", "dot")
MAX_K = 256  # keys a query that a program keeps in registers; a larger k goes through matrix products in chunks
MOST_SPLITS = 32  # that one program merges one by one
NOTHING = tl.constexpr(-(2**63))
NAN_CODE = tl.constexpr(-(2**31) + 1)


@triton.jit
def _keys(score, index):
    """Scores (fp32) and indices as keys that sort descending into the result's order; −0 becomes 0, all NaNs are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    code = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN_CODE)
    return (code.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _bit(j: tl.constexpr, BITS: tl.constexpr):
    """Bit j of a position, where each of a position's bits is an axis."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - j - 1) + [2] + [1] * j)


@triton.jit
def _exchange(cube, descending, j: tl.constexpr, BITS: tl.constexpr):
    """Puts the pairs of keys that differ in bit j of their position in order."""
    other = tl.sum(cube, BITS - 1 - j, keep_dims=True) - cube  # exact: integers wrap around
    return tl.where((descending ^ _bit(j, BITS)) == 1, tl.maximum(cube, other), tl.minimum(cube, other))


@triton.jit
def _ascending(keys, LOG_ROWS: tl.constexpr, LOG: tl.constexpr):
    """Bitonic sort of 2^LOG keys along the last axis."""
    BITS: tl.constexpr = LOG_ROWS + LOG
    cube = tl.reshape(keys, [2] * BITS)
    for stage in tl.static_range(1, LOG + 1):
        for j in tl.static_range(stage):
            cube = _exchange(cube, _bit(stage, BITS) if stage < LOG else 0, stage - 1 - j, BITS)
    return tl.reshape(cube, (2**LOG_ROWS, 2**LOG))


@triton.jit
def _merge(best, found, LOG_ROWS: tl.constexpr, LOG: tl.constexpr):
    """The 2^LOG largest keys of best (descending) and of found (ascending, no more than those), descending."""
    PARTS: tl.constexpr = 2**LOG // found.shape[1]
    folded = tl.reshape(best, (2**LOG_ROWS, PARTS, found.shape[1]))
    last = (tl.arange(0, PARTS) == PARTS - 1)[None, :, None]
    folded = tl.where(last, tl.maximum(folded, tl.expand_dims(found, 1)), folded)
    cube = tl.reshape(folded, [2] * (LOG_ROWS + LOG))
    for j in tl.static_range(LOG):
        cube = _exchange(cube, 1, LOG - 1 - j, LOG_ROWS + LOG)
    return tl.reshape(cube, (2**LOG_ROWS, 2**LOG))


@triton.jit
def _forward_kernel(
    q_ptr, d_ptr, scale_ptr, segments, keys_ptr, B, N, tiles,
    D: tl.constexpr, LOG_K: tl.constexpr, LOG_M: tl.constexpr, LOG_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr, SCALED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (b, s): the K best keys of queries b BLOCK_N … (of query b alone, with segments) among the s-th `tiles` tiles."""
    # With segments, or one query in all, a program has one: the product's other columns are idle, which costs no bandwidth.
    ROWS: tl.constexpr = 2**LOG_ROWS
    K: tl.constexpr = 2**LOG_K
    col = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, BLOCK_N)
    live = (col < B) & (tl.arange(0, BLOCK_N) < ROWS)
    start = tl.zeros((), tl.int64)
    end = start + N  # an N of 1 is a Python int here
    if SEGMENTED:
        start, end = tl.load(segments + tl.program_id(0)), tl.load(segments + tl.program_id(0) + 1)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(1).to(tl.int64) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(end - start, BLOCK_M))
    best = tl.full((ROWS, K), NOTHING, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(first * CHUNKS, last * CHUNKS):
        row = (step // CHUNKS) * BLOCK_M + tl.arange(0, BLOCK_M)
        k = (step % CHUNKS) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = k < D if D % BLOCK_D else k >= 0
        x = tl.load(d_ptr + (start + row)[:, None] * D + k[None, :], mask=(row < end - start)[:, None] & inside[None, :], other=0.0)
        w = tl.load(q_ptr + col[None, :] * D + k[:, None], mask=live[None, :] & inside[:, None], other=0.0)
        if INTERPRETED:  # the interpreter multiplies bf16's bits as integers
            w = w.to(tl.float32)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
        if COSINE:
            square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        if step % CHUNKS == CHUNKS - 1:
            s = acc
            factor = tl.full((BLOCK_M,), 1.0, tl.float32)
            if SCALED:
                factor = tl.load(scale_ptr + start + row, mask=row < end - start, other=0.0)
            if COSINE:
                factor = factor / tl.maximum(tl.sqrt(square) * tl.abs(factor), 1e-12, propagate_nan=tl.PropagateNan.ALL)
            s = s * factor[:, None]
            if ROWS == 1:
                s = tl.sum(tl.where(live[None, :], s, 0.0), 1)[None, :]
            else:
                s = tl.trans(s)
            keys = tl.where((row < end - start)[None, :], _keys(s, row[None, :]), NOTHING)
            # Two ifs within one another do not compile where the outer one is always taken.
            if CHUNKS == 1:  # noqa: SIM114
                best = _merge(best, _ascending(keys, LOG_ROWS, LOG_M), LOG_ROWS, LOG_K)
            elif tl.max((keys > tl.min(best, 1)[:, None]).to(tl.int32)) > 0:
                best = _merge(best, _ascending(keys, LOG_ROWS, LOG_M), LOG_ROWS, LOG_K)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            square = tl.zeros((BLOCK_M,), tl.float32)
    query = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (query * tl.num_programs(1) + tl.program_id(1))[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(keys_ptr + at, best, mask=(query < B)[:, None])


@triton.jit
def _merge_kernel(keys_ptr, merged_ptr, values_ptr, indices_ptr, splits, share, k, LOG_K: tl.constexpr, LAST: tl.constexpr):
    """Program (b, g): the K best keys of what the g-th `share` splits found for query b; where it is the last, its k best, decoded."""
    K: tl.constexpr = 2**LOG_K
    at = tl.arange(0, K)
    query = tl.program_id(0).to(tl.int64)
    best = tl.full((1, K), NOTHING, tl.int64)
    for split in range(tl.program_id(1) * share, tl.minimum(tl.program_id(1) * share + share, splits)):
        best = _merge(best, tl.load(keys_ptr + (query * splits + split) * K + (K - 1 - at)[None, :]), 0, LOG_K)
    best = tl.reshape(best, (K,))
    if LAST:
        code = (best >> 32).to(tl.int32)
        value = (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        value = tl.where(code == NAN_CODE, float("nan"), tl.where(best == NOTHING, float("-inf"), value))
        index = tl.where(best == NOTHING, -1, 0xFFFFFFFF - (best & 0xFFFFFFFF))
        tl.store(values_ptr + query * k + at, value, mask=at < k)
        tl.store(indices_ptr + query * k + at, index, mask=at < k)
    else:
        tl.store(merged_ptr + (query * tl.num_programs(1) + tl.program_id(1)) * K + at, best)


def configuration(arch: str, dtype: str, d: int) -> Config:
    """Tiles by architecture, dtype and width, chosen from what the compiler reports."""
    # 16 queries are the fewest that a warp group's matrix instruction takes; with 64 documents and steps of 32 the sort,
    # the k best so far and the documents' squares share 128 registers a thread, which is 4 blocks a multiprocessor.
    # fp32's operands pass through registers as three TF32 each, quantised ones widened: shorter steps or fewer stages
    # leave room for the rest. What ptxas fits without a spill differs by architecture.
    blackwell = arch == "sm_100"
    table = {"fp32": Config(64, 16, 16, 4, 2 if arch == "sm_90" else 3), "int8": Config(64, 16, 32, 4, 3 if blackwell else 2)}
    table["fp8"] = table["int8"]
    return tuned().get(key(OP, "forward", arch, dtype, d)) or table.get(dtype, Config(64, 16, 16 if blackwell else 32, 4, 3))


def _log2(n: int) -> int:
    """The exponent of the smallest power of two that is not below n."""
    return (n - 1).bit_length()


def _constants(config: Config, dtype: str, d: int, k: int, metric: str, segmented: bool, single: bool) -> dict[str, Any]:
    logs = {"LOG_K": _log2(max(config.block_m, k)), "LOG_M": _log2(config.block_m), "LOG_ROWS": 0 if segmented or single else _log2(config.block_n)}
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    flags = {"COSINE": metric == "cosine", "SCALED": dtype in ("int8", "fp8"), "SEGMENTED": segmented}
    return {"D": d, **logs, **tiles, **flags, "PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}


def variants(arch: str) -> Iterator[Variant]:
    """Every compilation that ships, on 16 queries (one, with segments), 100,000 documents and the 100 best."""
    N, k = 100_000, 100
    for dtype, segmented in [(t, False) for t in ("fp16", "bf16", "fp32", "int8", "fp8")] + [("fp16", True)]:
        for d in (64, 128, 384, 1024) if dtype == "fp16" else (128, 384):
            if dtype == "fp8" and arch == "sm_80":
                continue
            config, B = configuration(arch, dtype, d), 1 if segmented else 16
            constants = _constants(config, dtype, d, k, "cosine", segmented, B == 1)
            query = "*fp16" if dtype in ("int8", "fp8") else POINTERS[dtype]
            types = {"q_ptr": query, "d_ptr": POINTERS[dtype], "scale_ptr": "*fp32", "B": "i32", "N": "i64", "tiles": "i32"}
            signature = {n: "constexpr" if n in constants else types.get(n, "*i64") for n in _forward_kernel.arg_names}
            shape = f"{B} queries, {N:,} documents, d {d}, k {k}" if B > 1 else f"a segment of {N:,} documents, d {d}, k {k}"
            yield Variant(OP, "forward", dtype, d, config, _forward_kernel, signature, constants, shape, N * d * WIDTHS[dtype], 2.0 * B * N * d)
    B, splits, share, log_k = 16, 528, 23, _log2(k)
    pointers = {"keys_ptr": "*i64", "merged_ptr": "*i64", "values_ptr": "*fp32", "indices_ptr": "*i64"}
    for last in (False, True):
        constants = {"LOG_K": log_k, "LAST": last}
        signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in _merge_kernel.arg_names}
        moved, shape = B * (share if last else splits) * 2**log_k * 8, f"{B} queries, {share if last else splits} splits, k {k}"
        yield Variant(f"{OP}_merge", "forward", "int64", 0, Config(1, 2**log_k, 1, 1, 1), _merge_kernel, signature, constants, shape, moved, 0)


def workload(variant: Variant, device: torch.device, rows: int) -> Callable[[], object]:
    """The call that tune times: the 100 best of 100 · rows documents for each of 16 queries."""
    g = seeded()
    x, scales = documents(100 * rows, variant.d, variant.torch_dtype, device, g)
    queries = unit(16, variant.d, g).to(device)
    return lambda: similarity_topk(queries, x, min(100, len(x)), scales=scales)


def _triton(queries: Tensor, documents: Tensor, k: int, segments: Tensor | None, metric: str, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    checks.fp8_runs("documents", documents.dtype, documents.device)
    (B, d), N, device, dtype = queries.shape, len(documents), queries.device, NAMES[documents.dtype]
    config = configuration(architecture(device), dtype, d)
    single = B == 1 and segments is None
    constants = _constants(config, dtype, d, k, metric, segments is not None, single)
    longest = N if segments is None else int(segments.diff().amax())
    tiles, groups = triton.cdiv(longest, config.block_m), triton.cdiv(B, 1 if segments is not None else config.block_n)
    # Enough programs for four a multiprocessor, each with documents enough to fill its k.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    share = max(triton.cdiv(tiles * groups, 4 * processors), 2 ** constants["LOG_K"] // config.block_m, 1)
    splits = max(triton.cdiv(tiles, share), 1)
    queries = normalize(queries.float(), dim=-1) if metric == "cosine" else queries
    queries = queries.to(torch.float16 if documents.dtype in checks.QUANTIZED else documents.dtype).contiguous()
    keys = torch.empty(B, splits, 2 ** constants["LOG_K"], dtype=torch.int64, device=device)
    values, indices = torch.empty(B, k, dtype=torch.float32, device=device), torch.empty(B, k, dtype=torch.int64, device=device)
    unused = queries
    _forward_kernel[(groups, splits)](
        queries, documents.contiguous(), (unused if scales is None else scales).contiguous(), (unused if segments is None else segments).contiguous(),
        keys, B, N, share, **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > MOST_SPLITS:  # in two rounds, each as long as the other
        share = math.isqrt(splits - 1) + 1
        rounds = triton.cdiv(splits, share)
        merged = torch.empty(B, rounds, 2 ** constants["LOG_K"], dtype=torch.int64, device=device)
        _merge_kernel[(B, rounds)](keys, merged, values, indices, splits, share, k, LOG_K=constants["LOG_K"], LAST=False, num_warps=1)
        keys, splits = merged, rounds
    _merge_kernel[(B, 1)](keys, keys, values, indices, splits, splits, k, LOG_K=constants["LOG_K"], LAST=True, num_warps=1)
    return values, indices


def _check(queries: Tensor, documents: Tensor, k: int, segments: Tensor | None, metric: str, scales: Tensor | None) -> None:
    """What shapes, dtypes and devices tell."""
    checks.matrix("queries", queries)
    checks.matrix("documents", documents, checks.FLOATS + checks.QUANTIZED, queries.shape[1])
    checks.row_scales("documents", documents, scales)
    checks.check(1 <= k <= len(documents), "k", f"1 to {len(documents)}, the number of documents", k)
    checks.check(metric in METRICS, "metric", "'cosine' or 'dot'", repr(metric))
    if segments is not None:
        checks.offsets("segments", segments, len(queries))
    checks.same_device(queries=queries, documents=documents, segments=segments, scales=scales)


@operator("similarity_topk")
def _op(queries: Tensor, documents: Tensor, k: int, segments: Tensor | None, metric: str, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(queries, documents, k, segments, metric, scales)
    if segments is not None:
        checks.rising(("segments", segments, len(documents)))
    arguments = queries, documents, k, segments, metric, scales
    match backend.resolve(queries):
        case "reference":
            return reference.similarity_topk(*arguments)
        case "cpu":
            return cpu.similarity_topk(*arguments)
    if k > MAX_K or len(queries) == 0 or len(documents) >= 2**32:
        return cpu.chunked_topk(*arguments)
    with on_device(queries):
        return _triton(*arguments)


@torch.library.register_fake("rerank_kernels::similarity_topk")
def _(queries: Tensor, documents: Tensor, k: int, segments: Tensor | None, metric: str, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(queries, documents, k, segments, metric, scales)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def similarity_topk(
    queries: Tensor, documents: Tensor, k: int, segments: Tensor | None = None, metric: str = "cosine", scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar documents of each query, in one pass over the documents.

    On a GPU, quantised documents are computed with in fp16 and others in their own dtype, to which queries are cast;
    sums are fp32. Up to k = 256 the selection is fused with the products; beyond, products go in chunks.

    Args:
        queries: B × d, fp32, fp16 or bf16.
        documents: N × d, fp32, fp16, bf16, int8 or float8_e4m3fn; N below 2³².
        k: results a query, from 1 to N.
        segments: int64 offsets (B + 1) into documents; query b sees only documents[segments[b]:segments[b + 1]].
            Without it every query sees all of them.
        metric: "cosine" (0 for a zero vector) or "dot".
        scales: N, fp32: what each row of int8 or fp8 documents is multiplied with.

    Returns:
        values (B × k, fp32, descending) and indices (B × k, int64, counted from the start of the query's segment).
        Equal values stand in ascending index, NaN stands after −inf. Where there are fewer than k documents: value
        −inf, index −1.

    Raises:
        ValueError: arguments that do not fit; the message names the argument and what it held.
    """
    checks.check(not isinstance(k, float) and k is not None, "k", "an integer", k)
    values, indices = _op(queries, documents, k, segments, metric, scales)
    return values, indices
