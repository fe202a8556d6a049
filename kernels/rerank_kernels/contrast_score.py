"""Final scores from token similarities: the part of a method that needs the whole pool, in one small kernel.

For each pool of K pairs, all of one query of Lq tokens:
    w_i = max_k A_ik − mean_k A_ik, uniform where they sum to 0
    a_k = Σ_i w_i A_ik / Σ_i w_i
    b   = z(z(cosine) + alpha z(a) + Σ weight z(term))
    out = b + gamma z(e_k · f),  f = Σ_k softmax(b / 0.3)_k e_k       (gamma > 0 only)
z(x) = (x − mean) / std over the pool, 0 where std is 0. A document with a NaN among its values is NaN in the result and
left out of every maximum, mean and std. A query without tokens is scored by the other terms alone.
"""

# The arguments of Triton's functions have no types that Python knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import backend, checks, reference
from .backend import on_device, operator, tl, triton
from .configs import Config, Variant

OP = "contrast_score"
FLAT = tl.constexpr(reference.FLAT)
MAX_POOL, MAX_LQ, MAX_D = 4096, 1024, 2048  # what a program holds in registers; the reference takes larger ones


@triton.jit
def _zscore(x, known, count):
    centred = tl.where(known, x - tl.sum(tl.where(known, x, 0.0), 0) / count, 0.0)
    std = tl.sqrt(tl.sum(centred * centred, 0) / count)
    flat = std <= tl.max(tl.where(known, tl.abs(x), 0.0), 0) * FLAT
    return tl.where(flat, 0.0, centred / tl.where(flat, 1.0, std))


@triton.jit
def _forward_kernel(
    A_ptr, a_offsets, pools, columns_ptr, weights_ptr, e_ptr, out_ptr, P, terms, alpha, gamma,
    D: tl.constexpr, POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FEEDBACK: tl.constexpr,
):  # fmt: skip
    """Program b: pool b. What is found tile by tile goes through out, which is the pool's own stretch of memory."""
    start, end = tl.load(pools + tl.program_id(0)), tl.load(pools + tl.program_id(0) + 1)
    if start == end:
        return
    a_start = tl.load(a_offsets + start)
    Lq = tl.load(a_offsets + start + 1) - a_start
    i, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    count = 0.0
    for tile in range(tl.cdiv(end - start, BLOCK_M)):
        k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        live = k < end - start
        block = tl.load(A_ptr + a_start + k[:, None] * Lq + i[None, :], mask=live[:, None] & (i < Lq)[None, :], other=0.0)
        wrong = tl.sum((block != block).to(tl.int32), 1)
        for term in range(terms):
            x = tl.load(columns_ptr + term * P + start + k, mask=live, other=0.0)
            wrong += (x != x).to(tl.int32)
        if FEEDBACK:
            e = tl.load(e_ptr + (start + k)[:, None] * D + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
            wrong += tl.sum((e != e).to(tl.int32), 1)
        known = live & (wrong == 0)
        tl.store(out_ptr + start + k, tl.where(known, 0.0, float("nan")), mask=live)
        top = tl.maximum(top, tl.max(tl.where(known[:, None], block, float("-inf")), 0))
        total += tl.sum(tl.where(known[:, None], block, 0.0), 0)
        count += tl.sum(known.to(tl.float32), 0)
    tl.debug_barrier()
    at = tl.arange(0, POOL)
    inside = at < end - start
    mark = tl.load(out_ptr + start + at, mask=inside, other=float("nan"))
    known = mark == mark
    tl.debug_barrier()
    if count == 0:
        return
    fused = tl.zeros((POOL,), tl.float32)
    for term in range(terms):
        x = tl.load(columns_ptr + term * P + start + at, mask=inside, other=0.0)
        fused += tl.load(weights_ptr + term) * _zscore(x, known, count)
    if Lq > 0:
        w = tl.where(i < Lq, tl.maximum(top - total / count, 0.0), 0.0)
        w = tl.where(tl.sum(w, 0) > FLAT, w, tl.where(i < Lq, 1.0, 0.0))
        w = w / tl.sum(w, 0)
        for tile in range(tl.cdiv(end - start, BLOCK_M)):
            k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (k < end - start)[:, None] & (i < Lq)[None, :]
            block = tl.load(A_ptr + a_start + k[:, None] * Lq + i[None, :], mask=mask, other=0.0)
            tl.store(out_ptr + start + k, tl.sum(block * w[None, :], 1), mask=k < end - start)
        tl.debug_barrier()
        fused += alpha * _zscore(tl.load(out_ptr + start + at, mask=inside, other=0.0), known, count)
        tl.debug_barrier()
    b = _zscore(fused, known, count)
    if FEEDBACK:
        p = tl.where(known, tl.exp((b - tl.max(tl.where(known, b, float("-inf")), 0)) / 0.3), 0.0)
        tl.store(out_ptr + start + at, p / tl.sum(p, 0), mask=inside)
        tl.debug_barrier()
        f = tl.zeros((BLOCK_D,), tl.float32)
        for tile in range(tl.cdiv(end - start, BLOCK_M)):
            k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            p_k = tl.load(out_ptr + start + k, mask=k < end - start, other=0.0)
            mask = (p_k > 0)[:, None] & (c < D)[None, :]  # an unknown document has p = 0, and its NaNs stay out
            f += tl.sum(p_k[:, None] * tl.load(e_ptr + (start + k)[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32), 0)
        tl.debug_barrier()
        for tile in range(tl.cdiv(end - start, BLOCK_M)):
            k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (k < end - start)[:, None] & (c < D)[None, :]
            e = tl.load(e_ptr + (start + k)[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + start + k, tl.sum(e * f[None, :], 1), mask=k < end - start)
        tl.debug_barrier()
        b += gamma * _zscore(tl.load(out_ptr + start + at, mask=inside, other=0.0), known, count)
        tl.debug_barrier()
    tl.store(out_ptr + start + at, tl.where(known, b, float("nan")), mask=inside)


def configuration(pool: int, Lq: int, d: int) -> Config:
    """Tiles by the largest pool, the longest query and the embeddings' width (1 without feedback), as ptxas fits them without a spill."""
    columns, width = max(16, triton.next_power_of_2(Lq)), max(16, triton.next_power_of_2(d))
    return Config(max(1, min(64, 1024 // columns, 2048 // width)), columns, width, 4 if max(pool, columns, width // 4) <= 128 else 8 if pool <= 512 else 16, 1)


def variants(arch: str) -> Iterator[Variant]:
    """Every compilation that ships, on 64 pools of 100 documents and queries of 32 tokens."""
    B, K, Lq = 64, 100, 32
    for feedback, d in ((False, 1), (True, 384)):
        config = configuration(K, Lq, d)
        constants = _constants(config, K, d, feedback)
        types = {"a_offsets": "*i64", "pools": "*i64", "P": "i64", "terms": "i32", "alpha": "fp32", "gamma": "fp32"}
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in _forward_kernel.arg_names}
        moved = B * K * 4 * (2 * Lq + 2 + (3 * d if feedback else 0))
        yield Variant(
            OP, "forward", "fp32", d if feedback else 0, config, _forward_kernel, signature, constants, f"{B} pools of {K}, {Lq} query tokens", moved, 0
        )


def _constants(config: Config, pool: int, d: int, feedback: bool) -> dict[str, int | bool]:
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    return {"D": d, "POOL": max(16, triton.next_power_of_2(pool)), **tiles, "FEEDBACK": feedback}


@operator("contrast_score")
def _op(
    A: Tensor, a_offsets: Tensor, pools: Tensor, columns: Tensor, weights: Sequence[float], alpha: float, gamma: float, embeddings: Tensor | None
) -> Tensor:
    P = columns.shape[1]
    checks.rising(("a_offsets", a_offsets, len(A)), ("pools", pools, P))
    if P == 0:
        return columns.new_empty(0)
    sizes, lengths = pools.diff(), a_offsets.diff()
    expected = lengths[torch.repeat_interleave(pools[:-1].clamp(max=P - 1), sizes, output_size=P)]
    pool, Lq, differs = torch.stack([sizes.amax(), lengths.amax(), (lengths != expected).any().long()]).tolist()
    if differs:
        pair = int((lengths != expected).nonzero()[0])
        raise ValueError(
            f"a_offsets must give all pairs of a pool as many values: pair {pair} has {int(lengths[pair])}, its pool's first {int(expected[pair])}"
        )
    d = 1 if embeddings is None else embeddings.shape[1]
    if backend.resolve(A) != "triton" or pool > MAX_POOL or Lq > MAX_LQ or d > MAX_D:
        terms = list(zip(columns[1:].unbind(), weights[1:]))
        return reference.contrast_score(A, a_offsets, pools, columns[0], alpha, terms, gamma, embeddings)
    config, out = configuration(pool, Lq, d), torch.empty(P, dtype=torch.float32, device=A.device)
    with on_device(A):
        _forward_kernel[(len(sizes),)](
            A.contiguous(), a_offsets.contiguous(), pools.contiguous(), columns.contiguous(), torch.tensor(weights, dtype=torch.float32, device=A.device),
            (A if embeddings is None else embeddings).contiguous(), out, P, len(columns), alpha, gamma,
            **_constants(config, pool, d, embeddings is not None), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


@torch.library.register_fake("rerank_kernels::contrast_score")
def _(A: Tensor, a_offsets: Tensor, pools: Tensor, columns: Tensor, weights: Sequence[float], alpha: float, gamma: float, embeddings: Tensor | None) -> Tensor:
    return columns.new_empty(columns.shape[1])


def contrast_score(
    A: Tensor,
    a_offsets: Tensor,
    pools: Tensor,
    cosine: Tensor,
    *,
    alpha: float = 2.0,
    terms: Sequence[tuple[Tensor, float]] = (),
    gamma: float = 0.0,
    embeddings: Tensor | None = None,
) -> Tensor:
    """Query-token contrast over each pool, weighted mean, sum of z-scores, feedback; the formulas stand at the top of this file.

    Args:
        A: Σ_p Lq(p) values, pair after pair, as subspace_attention returns them (fp32).
        a_offsets: P + 1, int64, where each pair's values stand in A.
        pools: B + 1, int64 offsets into the P pairs; the pairs of one pool share their query.
        cosine: P, the first stage's similarity.
        alpha: weight of the token term.
        terms: further (scores of length P, weight).
        gamma: weight of the feedback term.
        embeddings: P × d pooled document vectors, needed where gamma > 0.

    Returns:
        P, fp32.

    Raises:
        ValueError: gamma > 0 without embeddings, a pool whose pairs differ in Lq, or arguments that do not fit; the
            message names the argument and what it held.
    """
    checks.check(A.ndim == 1 and A.dtype == torch.float32, "A", "a vector of float32", f"{A.dtype} of shape {tuple(A.shape)}")
    for name, x in [("cosine", cosine), *((f"terms[{i}]", term) for i, (term, _) in enumerate(terms))]:
        checks.check(x.shape == cosine.shape and x.ndim == 1 and x.is_floating_point(), name, "a vector of P scores", f"{x.dtype} of shape {tuple(x.shape)}")
        checks.same_device(A=A, **{name: x})
    checks.offsets("a_offsets", a_offsets, len(cosine))
    checks.offsets("pools", pools)
    checks.check(gamma >= 0, "gamma", "at least 0", gamma)
    if gamma > 0:
        checks.check(embeddings is not None, "embeddings", "given with gamma > 0", "None")
    if embeddings is not None:
        checks.matrix("embeddings", embeddings)
        checks.check(len(embeddings) == len(cosine), "embeddings", f"of {len(cosine)} rows, one a pair", f"of shape {tuple(embeddings.shape)}")
    checks.same_device(A=A, a_offsets=a_offsets, pools=pools, embeddings=embeddings)
    columns = torch.stack([cosine.float(), *(term.float() for term, _ in terms)])
    weights = [1.0, *(float(weight) for _, weight in terms)]
    out: Tensor = _op(A, a_offsets, pools, columns, weights, float(alpha), float(gamma), embeddings if gamma > 0 else None)
    return out
