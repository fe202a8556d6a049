"""Subspace attention: each query token's soft maximum of similarity over a document's tokens, for packed documents.

With s_ij = q_i · d_j: A_i = Σ_j exp((s_ij − m)/τ) s_ij / Σ_j exp((s_ij − m)/τ), which is MaxSim's max_j s_ij at τ = 0.
Token vectors are at unit length, so s lies in [−1, 1] and a shift m that is fixed by τ alone (`reference.softmax_shift`: 1 for
τ ≥ 0.025) replaces a running maximum: numerator and denominator are plain sums.
A document without tokens scores −1, a query without tokens has no values, a NaN stays in its document.
"""

# The arguments of Triton's functions have no types that Python knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend, checks, cpu, reference
from .backend import on_device, operator, tl, triton
from .configs import INTERPRETED, NAMES, POINTERS, WIDTHS, Config, Variant, architecture, key, tuned
from .reference import MIN_TAU
from .samples import documents, seeded, unit

OP = "subspace_attention"
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(q_ptr, d_ptr, q_row, q_live, d_row, d_live, k, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One step of d: document rows × BLOCK_D, and BLOCK_D × query columns, in one element type."""
    inside = k < D if D % BLOCK_D else k >= 0
    x = tl.load(d_ptr + d_row[:, None] * D + k[None, :], mask=d_live[:, None] & inside[None, :], other=0.0)
    w = tl.load(q_ptr + q_row[None, :] * D + k[:, None], mask=q_live[None, :] & inside[:, None], other=0.0)
    x = x.to(w.dtype)
    if INTERPRETED:  # the interpreter multiplies bf16's bits as integers
        return x.to(tl.float32), w.to(tl.float32)
    return x, w


@triton.jit
def _falls(offsets, i, count, rows):
    """How many of the texts i own rows that are none: offsets that do not begin at 0, fall, or do not end at the number of rows."""
    live = i < count
    left, right = tl.load(offsets + i, mask=live, other=0), tl.load(offsets + i + 1, mask=live, other=0)
    wrong = (right < left) | ((i == 0) & (left != 0)) | ((i == count - 1) & (right != rows))
    return tl.sum((live & wrong).to(tl.int64))


@triton.jit
def _facts_kernel(q_offsets, d_offsets, pairs, facts, B, N, P, q_rows, d_rows, BLOCK: tl.constexpr):
    """In one pass, so that the host waits once: whether q_offsets, d_offsets and pairs fit (0: yes), the longest query of a pair,
    whether another pair's is not as long as the first's, and the number of all pairs' query tokens."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    query, document = tl.load(pairs + 2 * i, mask=i < P, other=0), tl.load(pairs + 2 * i + 1, mask=i < P, other=0)
    inside = (query >= 0) & (query < B) & (document >= 0) & (document < N)
    live = (i < P) & inside
    length = tl.load(q_offsets + query + 1, mask=live, other=0) - tl.load(q_offsets + query, mask=live, other=0)
    first = tl.minimum(tl.maximum(tl.load(pairs), 0), B - 1)
    usual = tl.load(q_offsets + first + 1) - tl.load(q_offsets + first)
    tl.atomic_add(facts, _falls(q_offsets, i, B, q_rows))
    tl.atomic_add(facts + 1, _falls(d_offsets, i, N, d_rows))
    tl.atomic_add(facts + 2, tl.sum(((i < P) & (inside == 0)).to(tl.int64)))
    tl.atomic_max(facts + 3, tl.max(length))
    tl.atomic_add(facts + 4, tl.sum((live & (length != usual)).to(tl.int64)))
    tl.atomic_add(facts + 5, tl.sum(length))


@triton.jit
def _forward_kernel(
    q_ptr, q_offsets, d_ptr, d_offsets, scale_ptr, pairs, out_offsets, out_ptr, inv_tau, shift,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MAXSIM: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    query, document = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    q_start, d_start = tl.load(q_offsets + query), tl.load(d_offsets + document)
    Lq, Ld = tl.load(q_offsets + query + 1) - q_start, tl.load(d_offsets + document + 1) - d_start
    if tl.program_id(1) * BLOCK_N >= Lq:
        return
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MAXSIM:
        best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    else:
        num = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        den = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over tiles of rows and steps of d: a loop within a loop would stage the whole width in shared memory.
    for step in range(tl.cdiv(Ld, BLOCK_M) * CHUNKS):
        row = (step // CHUNKS) * BLOCK_M + tl.arange(0, BLOCK_M)
        k = (step % CHUNKS) * BLOCK_D + tl.arange(0, BLOCK_D)
        x, w = _load(q_ptr, d_ptr, q_start + col, col < Lq, d_start + row, row < Ld, k, D, BLOCK_D)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if step % CHUNKS == CHUNKS - 1:
            s = acc
            if SCALED:
                s *= tl.load(scale_ptr + d_start + row, mask=row < Ld, other=0.0)[:, None]
            if MAXSIM:
                best = tl.maximum(best, tl.where((row < Ld)[:, None], s, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
            else:
                p = tl.where((row < Ld)[:, None], tl.exp2((s - shift) * (inv_tau * LOG2E)), 0.0)
                num += p * s
                den += p
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MAXSIM:
        a = tl.where(tl.sum((best != best).to(tl.int32), 0) > 0, float("nan"), tl.max(best, 0))
    else:
        a = tl.sum(num, 0) / tl.sum(den, 0)
    start = pair * Lq if EVEN else tl.load(out_offsets + pair)
    tl.store(out_ptr + start + col, tl.where(Ld > 0, a, -1.0), mask=col < Lq)


@triton.jit
def _backward_kernel(
    grad_ptr, q_ptr, q_offsets, d_ptr, d_offsets, scale_ptr, pairs, out_offsets, dq_ptr, dd_ptr, inv_tau, shift,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MAXSIM: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA_i/ds_ij = p_ij/Σp (1 + (s_ij − A_i)/τ); MaxSim's goes to the first token that reaches the maximum."""
    pair = tl.program_id(0).to(tl.int64)
    query, document = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    q_start, d_start = tl.load(q_offsets + query), tl.load(d_offsets + document)
    Lq, Ld = tl.load(q_offsets + query + 1) - q_start, tl.load(d_offsets + document + 1) - d_start
    if tl.program_id(1) * BLOCK_N >= Lq:
        return
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    start = pair * Lq if EVEN else tl.load(out_offsets + pair)
    grad = tl.load(grad_ptr + start + col, mask=col < Lq, other=0.0)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    first = tl.full((BLOCK_N,), -1, tl.int64)
    num = tl.zeros((BLOCK_N,), tl.float32)
    den = tl.zeros((BLOCK_N,), tl.float32)
    for sweep in tl.static_range(2):  # what the softmax needs, then the gradient
        for tile in range(tl.cdiv(Ld, BLOCK_M)):
            row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for chunk in range(CHUNKS):
                k = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
                x, w = _load(q_ptr, d_ptr, q_start + col, col < Lq, d_start + row, row < Ld, k, D, BLOCK_D)
                s = tl.dot(x, w, s, input_precision=PRECISION)
            if SCALED:
                scale = tl.load(scale_ptr + d_start + row, mask=row < Ld, other=0.0)
                s *= scale[:, None]
            live = (row < Ld)[:, None]
            p = tl.where(live, tl.exp2((s - shift) * (inv_tau * LOG2E)), 0.0)
            if sweep == 0:
                if MAXSIM:
                    top, at = tl.max(tl.where(live, s, float("-inf")), 0, return_indices=True, return_indices_tie_break_left=True)
                    first = tl.where(top > best, tile * BLOCK_M + at, first)
                    best = tl.maximum(best, top)
                else:
                    num += tl.sum(p * s, 0)
                    den += tl.sum(p, 0)
            else:
                if MAXSIM:
                    g = tl.where(row[:, None] == first[None, :], grad[None, :], 0.0)
                else:
                    g = p * (1.0 / den)[None, :] * grad[None, :] * (1.0 + (s - (num / den)[None, :]) * inv_tau)
                if SCALED:
                    g *= scale[:, None]
                for chunk in range(CHUNKS):
                    k = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
                    x, w = _load(q_ptr, d_ptr, q_start + col, col < Lq, d_start + row, row < Ld, k, D, BLOCK_D)
                    dq = tl.dot(tl.trans(g).to(x.dtype), x, input_precision=PRECISION)
                    tl.atomic_add(dq_ptr + (q_start + col)[:, None] * D + k[None, :], dq, mask=(col < Lq)[:, None] & (k < D)[None, :])
                    if not SCALED:
                        dd = tl.dot(g.to(x.dtype), tl.trans(w), input_precision=PRECISION)
                        tl.atomic_add(dd_ptr + (d_start + row)[:, None] * D + k[None, :], dd, mask=live & (k < D)[None, :])


def configuration(direction: str, arch: str, dtype: str, d: int, Lq: int) -> Config:
    """Tiles by direction, architecture, dtype, width and query tokens, chosen from what the compiler reports."""
    found = tuned().get(key(OP, direction, arch, dtype, d))
    if found is not None:
        return found
    # Documents on M: 64 rows are one warp group's matrix instruction, and a query never fills a row of it with nothing.
    columns = 16 if Lq <= 16 else 32
    if direction == "backward":
        return Config(32, columns, 16, 4, 1) if dtype == "fp32" else Config(64, columns, 64, 8, 2)
    # Steps of 64 divide 384 and keep three stages of documents and queries in 36 kB: 5 to 6 blocks a multiprocessor.
    # fp32 goes through three TF32 products, whose operands take the registers that a third stage would feed.
    return Config(64, columns, 32, 4, 2) if dtype == "fp32" else Config(64, columns, 64, 4, 3)


def _constants(config: Config, dtype: str, d: int, tau: float, even: bool) -> dict[str, Any]:
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    scaled = dtype in ("int8", "fp8")
    return {"D": d, **tiles, "MAXSIM": tau == 0, "SCALED": scaled, "EVEN": even, "PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}


def variants(arch: str) -> Iterator[Variant]:
    """Every compilation that ships, on 1 query of 32 tokens and 1,000 documents of 160."""
    Ld, N = 160, 1000
    shipped = [(t, "forward", 32, 0.1) for t in ("fp16", "bf16", "fp32", "int8", "fp8")] + [(t, "backward", 32, 0.1) for t in ("fp16", "bf16", "fp32")]
    for dtype, direction, Lq, tau in [*shipped, ("fp16", "forward", 16, 0.1), ("fp16", "forward", 32, 0.0), ("fp16", "backward", 32, 0.0)]:
        if dtype == "fp8" and arch == "sm_80":
            continue
        for d in (64, 128, 384, 1024) if dtype == "fp16" else (128, 384):
            config = configuration(direction, arch, dtype, d, Lq)
            kernel = _forward_kernel if direction == "forward" else _backward_kernel
            constants = _constants(config, dtype, d, tau, even=True)
            types = {"q_ptr": "*fp16" if dtype in ("int8", "fp8") else POINTERS[dtype], "d_ptr": POINTERS[dtype], "inv_tau": "fp32", "shift": "fp32"}
            fp32 = ("grad_ptr", "scale_ptr", "out_ptr", "dq_ptr", "dd_ptr")
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp32" if n in fp32 else "*i64") for n in kernel.arg_names}
            moved = N * Ld * (d * WIDTHS[dtype] + 4 * constants["SCALED"]) + N * Lq * 4
            shape, flops = f"1 query x {Lq} tokens, {N:,} documents x {Ld}, d {d}" + (", tau 0" if tau == 0 else ""), 2.0 * N * Lq * Ld * d
            if direction == "backward":  # twice through the documents, their gradient added in fp32; scores twice and two products
                moved, flops = 2 * moved + N * Ld * d * 8, 4 * flops
            yield Variant(OP, direction, dtype, d, config, kernel, signature, constants, shape, moved, flops)


def workload(variant: Variant, device: torch.device, rows: int) -> Callable[[], object]:
    """The call that tune times, forward or backward: 1 query of 32 tokens and so many documents of 160."""
    g = seeded()
    x, scales = documents(160 * rows, variant.d, variant.torch_dtype, device, g)
    q, ends = (
        unit(32, variant.d, g).to(device, x.dtype if scales is None else torch.float16),
        torch.arange(0, len(x) + 1, 160, dtype=torch.int64, device=device),
    )
    pairs = torch.stack([torch.zeros_like(ends[1:]), torch.arange(rows, dtype=torch.int64, device=device)], 1)
    arguments = q, torch.tensor([0, 32], dtype=torch.int64, device=device), x, ends, pairs, 0.1, scales
    if variant.direction == "forward":
        return lambda: subspace_attention(*arguments)
    grad = torch.ones(32 * rows, dtype=torch.float32, device=device)
    return lambda: _backward_op(grad, *arguments)


@dataclass(frozen=True)
class _Plan:
    """What both kernels take.

    Attributes:
        tensors: by the names of their arguments.
        longest: tokens of a query.
        rows: query tokens of all pairs.
        even: whether all pairs have as many.
    """

    tensors: dict[str, Tensor]
    longest: int
    rows: int
    even: bool

    def launch(self, direction: str, d: Tensor, tau: float, **more: Tensor) -> None:
        dtype = NAMES[d.dtype]
        config = configuration(direction, architecture(d.device), dtype, d.shape[1], self.longest)
        kernel = _forward_kernel if direction == "forward" else _backward_kernel
        kernel[(len(self.tensors["pairs"]), triton.cdiv(self.longest, config.block_n))](
            **self.tensors,
            **more,
            inv_tau=1 / tau if tau else 1.0,
            shift=reference.softmax_shift(tau),
            **_constants(config, dtype, d.shape[1], tau, self.even),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _plan(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, scales: Tensor | None, pairs: Tensor) -> _Plan | None:
    """None where there is nothing to do, or offsets or pairs do not fit."""
    checks.fp8_runs("d", d.dtype, d.device)
    B, N, P = len(q_offsets) - 1, len(d_offsets) - 1, len(pairs)
    if not (B and N and P):
        return None
    q_offsets, d_offsets, pairs = q_offsets.contiguous(), d_offsets.contiguous(), pairs.contiguous()
    facts = q_offsets.new_zeros(6)
    _facts_kernel[(triton.cdiv(max(B, N, P), 1024),)](q_offsets, d_offsets, pairs, facts, B, N, P, len(q), len(d), BLOCK=1024)
    *wrong, longest, uneven, rows = facts.tolist()
    if any(wrong):
        return None
    out_offsets = pairs
    if uneven:
        lengths = q_offsets.diff()[pairs[:, 0]]
        out_offsets = lengths.cumsum(0) - lengths
    tensors = {
        "q_ptr": q.to(torch.float16 if d.dtype in checks.QUANTIZED else d.dtype).contiguous(), "q_offsets": q_offsets, "d_ptr": d.contiguous(),
        "d_offsets": d_offsets, "scale_ptr": q_offsets if scales is None else scales.contiguous(), "pairs": pairs, "out_offsets": out_offsets,
    }  # fmt: skip
    return _Plan(tensors, longest, rows, not uneven)


def _check(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float, scales: Tensor | None) -> None:
    """What shapes, dtypes and devices tell."""
    checks.check(tau == 0 or MIN_TAU <= tau < float("inf"), "tau", f"0 (MaxSim) or at least {MIN_TAU}", tau)
    checks.matrix("q", q)
    checks.matrix("d", d, checks.FLOATS + checks.QUANTIZED, q.shape[1])
    checks.row_scales("d", d, scales)
    checks.offsets("q_offsets", q_offsets)
    checks.offsets("d_offsets", d_offsets)
    good = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype == torch.int64
    checks.check(good, "pairs", "P × 2 int64", f"{pairs.dtype} of shape {tuple(pairs.shape)}")
    checks.same_device(q=q, q_offsets=q_offsets, d=d, d_offsets=d_offsets, pairs=pairs, scales=scales)


@operator("subspace_attention", differentiable=True)
def _op(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float, scales: Tensor | None) -> Tensor:
    _check(q, q_offsets, d, d_offsets, pairs, tau, scales)
    name = backend.resolve(q)
    if name == "cpu" and (found := cpu.native_attention(q, q_offsets, d, d_offsets, pairs, tau, scales)) is not None:
        return found  # the library has looked at offsets and pairs
    with on_device(q):
        plan = _plan(q, q_offsets, d, d_offsets, scales, pairs) if name == "triton" else None
        if plan is not None:
            out = torch.empty(plan.rows, dtype=torch.float32, device=q.device)
            if plan.rows:
                plan.launch("forward", d, tau, out_ptr=out)
            return out
    checks.rising(("q_offsets", q_offsets, len(q)), ("d_offsets", d_offsets, len(d)))
    if not len(pairs):
        return torch.empty(0, dtype=torch.float32, device=q.device)
    low, high = pairs.aminmax(dim=0)
    inside = bool((low >= 0).all()) and int(high[0]) < len(q_offsets) - 1 and int(high[1]) < len(d_offsets) - 1
    wanted = f"(query, document) among {len(q_offsets) - 1} queries and {len(d_offsets) - 1} documents"
    checks.check(inside, "pairs", wanted, f"({int(low[0])}…{int(high[0])}, {int(low[1])}…{int(high[1])})")
    return (cpu.torch_attention if name == "cpu" else reference.subspace_attention)(q, q_offsets, d, d_offsets, pairs, tau, scales)


@torch.library.register_fake("rerank_kernels::subspace_attention")
def _(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float, scales: Tensor | None) -> Tensor:
    _check(q, q_offsets, d, d_offsets, pairs, tau, scales)
    return q.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


@operator("subspace_attention_backward")
def _backward_op(
    grad: Tensor, q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of d (zero rows for quantised documents), fp32, added up with atomics where pairs share tokens."""
    if backend.resolve(q) != "triton":
        return reference.subspace_attention_backward(grad, q, q_offsets, d, d_offsets, pairs, tau, scales)
    dq, dd = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(d, dtype=torch.float32)
    if len(grad):
        with on_device(q):
            plan = _plan(q, q_offsets, d, d_offsets, scales, pairs)
            assert plan is not None, "the forward has looked at offsets and pairs"
            plan.launch("backward", d, tau, grad_ptr=grad.contiguous(), dq_ptr=dq, dd_ptr=dd)
    return dq, dd


@torch.library.register_fake("rerank_kernels::subspace_attention_backward")
def _(grad: Tensor, q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, dtype=torch.float32), torch.empty_like(d, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tau, scales = inputs
    ctx.backend = backend.chosen()  # the gradient of a GPU is computed in another thread
    ctx.save_for_backward(*tensors, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, q_offsets, d, d_offsets, pairs, scales = ctx.saved_tensors
    with backend.use_backend(ctx.backend):
        dq, dd = _backward_op(grad, q, q_offsets, d, d_offsets, pairs, ctx.tau, scales)
    return dq.to(q.dtype), None, dd.to(d.dtype) if d.is_floating_point() else None, None, None, None, None


torch.library.register_autograd("rerank_kernels::subspace_attention", _backward, setup_context=_setup)


def subspace_attention(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float = 0.1, scales: Tensor | None = None) -> Tensor:
    """Soft maximum of each query token's similarity over a document's tokens; the formula stands at the top of this file.

    Differentiable in q and d (fp32, fp16, bf16). Quantised documents are computed with in fp16, others in their own
    dtype, to which q is cast; sums are fp32.

    Args:
        q: packed query tokens, nnz_q × r, unit length (or zero), fp32, fp16 or bf16.
        q_offsets: B + 1, int64: query b owns the rows q_offsets[b] to q_offsets[b + 1].
        d: packed document tokens, nnz_d × r, unit length (or zero), fp32, fp16, bf16, int8 or float8_e4m3fn.
        d_offsets: N + 1, int64.
        pairs: P × 2 int64, (query, document).
        tau: temperature; 0 is MaxSim exactly.
        scales: nnz_d, fp32: what each row of int8 or fp8 documents is multiplied with.

    Returns:
        fp32 of length Σ_p Lq(p): pair after pair, one value a query token. A document without tokens scores −1 for
        every query token, a query without tokens has no values.

    Raises:
        ValueError: 0 < tau < 0.013 (exp leaves fp32's range), tau < 0, or arguments that do not fit; the message
            names the argument and what it held.
    """
    checks.check(isinstance(tau, (int, float)), "tau", "a number", tau)
    out: Tensor = _op(q, q_offsets, d, d_offsets, pairs, float(tau), scales)
    return out
