"""From token states to unit vectors: project_normalize on the model's subspace, quantised or not, and pool_normalize of the mean.

project: x = Vᵀh, y = x / ‖x‖ for each row h (V: d × r, or the identity). pool: the same for the mean of a text's tokens.
A zero vector stays zero, a text without tokens is zero. Quantised rows: y = scale · z, with |z| up to 127 (int8) or 448
(float8_e4m3fn); a row with a NaN has the scale NaN.
"""

# The arguments of Triton's functions have no types that Python knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import backend, checks, reference
from .ambient import exactly
from .backend import on_device, operator, tl, triton
from .configs import INTERPRETED, NAMES, POINTERS, WIDTHS, Config, Variant, architecture, key, tuned
from .samples import normal, seeded, unit

OP = "project_normalize"
MAX_COLUMNS = 1024  # a program holds whole rows of the result; the reference takes wider ones
LARGEST_TILE = 2**14  # values of those rows that tune lets a program hold
EPSILON = tl.constexpr(1e-12)


@triton.jit
def _project(
    h_ptr, v_ptr, row, rows, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, IDENTITY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x = Vᵀh, BLOCK_M × BLOCK_N in fp32, and max(‖x‖, ε)."""
    col = tl.arange(0, BLOCK_N)
    if IDENTITY:
        x = tl.load(h_ptr + row[:, None] * D + col[None, :], mask=(row < rows)[:, None] & (col < D)[None, :], other=0.0).to(tl.float32)
    else:
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for chunk in range((D + BLOCK_D - 1) // BLOCK_D):
            k = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            h = tl.load(h_ptr + row[:, None] * D + k[None, :], mask=(row < rows)[:, None] & (k < D)[None, :], other=0.0)
            v = tl.load(v_ptr + k[:, None] * R + col[None, :], mask=(k < D)[:, None] & (col < R)[None, :], other=0.0)
            if INTERPRETED:  # the interpreter multiplies bf16's bits as integers
                h, v = h.to(tl.float32), v.to(tl.float32)
            x = tl.dot(h, v, x, input_precision=PRECISION)
    return x, tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPSILON, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _forward_kernel(
    h_ptr, v_ptr, out_ptr, scale_ptr, rows, D: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IDENTITY: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x, norm = _project(h_ptr, v_ptr, row, rows, D, R, BLOCK_M, BLOCK_N, BLOCK_D, IDENTITY, PRECISION)
    y = x / norm[:, None]
    if LARGEST > 0:
        scale = tl.where(tl.sum((y != y).to(tl.int32), 1) > 0, float("nan"), tl.max(tl.abs(y), 1) / LARGEST)
        tl.store(scale_ptr + row, scale, mask=row < rows)
        y = y / tl.where(scale == 0, 1.0, scale)[:, None]
        if LARGEST == 127:
            y = (y + 12582912.0) - 12582912.0  # 1.5 · 2²³: to the nearest integer, halves to even
    col = tl.arange(0, BLOCK_N)
    tl.store(out_ptr + row[:, None] * R + col[None, :], y.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (col < R)[None, :])


@triton.jit
def _backward_kernel(
    h_ptr, v_ptr, grad_ptr, dx_ptr, rows, D: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IDENTITY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = (g − y (y · g)) / ‖x‖, with x computed anew; what V and h receive are two plain products of it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x, norm = _project(h_ptr, v_ptr, row, rows, D, R, BLOCK_M, BLOCK_N, BLOCK_D, IDENTITY, PRECISION)
    col = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (col < R)[None, :]
    g = tl.load(grad_ptr + row[:, None] * R + col[None, :], mask=inside, other=0.0)
    y = x / norm[:, None]
    radial = tl.where(norm > EPSILON, tl.sum(y * g, 1), 0.0)
    tl.store(dx_ptr + row[:, None] * R + col[None, :], (g - y * radial[:, None]) / norm[:, None], mask=inside)


@triton.jit
def _pool_kernel(h_ptr, offsets, out_ptr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    text = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + text), tl.load(offsets + text + 1)
    col = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(tl.cdiv(end - start, BLOCK_M)):
        row = start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        total += tl.load(h_ptr + row[:, None] * D + col[None, :], mask=(row < end)[:, None] & (col < D)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(end - start, 1).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), EPSILON, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + text * D + col, mean / norm, mask=col < D)


def configuration(direction: str, arch: str, dtype: str, d: int, columns: int, identity: bool) -> Config:
    """Tiles by direction, architecture, dtype, width and columns of the result (a power of two)."""
    if identity or direction == "pool":  # no products: as many whole rows as 32 registers a thread hold
        return Config(max(4096 // columns, 1), columns, 16, 4, 2)
    found = tuned().get(key(OP, direction, arch, dtype, d))
    if found is not None and found.block_n == columns:
        return found
    # 64 rows × 128 columns are 64 registers a thread; wider results have fewer rows, narrower ones the fewest a product takes.
    rows = max(8192 // columns, 16) if columns >= 128 else 64
    return Config(rows, columns, 32, 8 if dtype == "fp32" or columns > 512 else 4, 2)


def _columns(width: int) -> int:
    return int(max(16, triton.next_power_of_2(width)))


def _constants(config: Config, dtype: str, d: int, r: int, identity: bool) -> dict[str, Any]:
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    return {"D": d, "R": r, **tiles, "IDENTITY": identity, "PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}


def variants(arch: str) -> Iterator[Variant]:
    """Every compilation that ships, on 160,000 tokens and 128 columns; fp16 also to int8."""
    rows, r = 160_000, 128
    for dtype, direction, out in (
        [(t, "forward", t) for t in ("fp16", "bf16", "fp32")] + [("fp16", "forward", "int8")] + [(t, "backward", t) for t in ("fp16", "fp32")]
    ):
        for d in (384, 768):
            config = configuration(direction, arch, dtype, d, r, False)
            kernel = _forward_kernel if direction == "forward" else _backward_kernel
            constants = _constants(config, dtype, d, r, False) | ({"LARGEST": 127.0 if out == "int8" else 0.0} if direction == "forward" else {})
            types = {"h_ptr": POINTERS[dtype], "v_ptr": POINTERS[dtype], "out_ptr": POINTERS[out], "rows": "i64"}
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
            width = WIDTHS[dtype]
            moved = rows * (d * width + r * (8 if direction == "backward" else 1 if out == "int8" else width))
            name = dtype if out == dtype else f"{dtype}>{out}"
            shape, flops = f"{rows:,} tokens, d {d} to {r}", 2.0 * rows * d * r
            yield Variant(OP, direction, name, d, config, kernel, signature, constants, shape, moved, flops, LARGEST_TILE)
    config = configuration("pool", arch, "fp16", 384, 512, True)
    constants = {"D": 384, "BLOCK_M": config.block_m, "BLOCK_N": 512}
    signature = {"h_ptr": "*fp16", "offsets": "*i64", "out_ptr": "*fp32"} | dict.fromkeys(constants, "constexpr")
    yield Variant(
        "pool_normalize", "forward", "fp16", 384, config, _pool_kernel, signature, constants, f"{rows:,} tokens of 1,000 texts, d 384", rows * 384 * 2, 0
    )


def workload(variant: Variant, device: torch.device, rows: int) -> Callable[[], object]:
    """The call that tune times, forward or backward: 160 · rows tokens to 128 columns."""
    g, dtype = seeded(), variant.torch_dtype
    h, V = unit(160 * rows, variant.d, g).to(device).to(dtype), torch.linalg.qr(normal(variant.d, 128, g))[0].to(device, dtype)
    if variant.direction == "forward":
        return lambda: project_normalize(h, V, dtype)
    grad = torch.ones(len(h), 128, dtype=torch.float32, device=device)
    return lambda: _backward_op(grad, h, V)


def _launch(direction: str, h: Tensor, V: Tensor | None, outs: dict[str, Tensor], **constants: Any) -> None:
    dtype, d, r = NAMES[h.dtype], h.shape[1], h.shape[1] if V is None else V.shape[1]
    config = configuration(direction, architecture(h.device), dtype, d, _columns(r), V is None)
    kernel = _forward_kernel if direction == "forward" else _backward_kernel
    h = h.contiguous()
    with on_device(h):
        kernel[(triton.cdiv(len(h), config.block_m),)](
            h_ptr=h,
            v_ptr=h if V is None else V.to(h.dtype).contiguous(),
            **outs,
            rows=len(h),
            **_constants(config, dtype, d, r, V is None),
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _check(h: Tensor, V: Tensor | None, dtype: torch.dtype) -> None:
    """What shapes, dtypes and devices tell."""
    checks.matrix("h", h)
    if V is not None:
        checks.matrix("V", V)
        checks.check(len(V) == h.shape[1], "V", f"of {h.shape[1]} rows, the columns of h", f"of shape {tuple(V.shape)}")
    checks.check(dtype in checks.FLOATS + checks.QUANTIZED, "dtype", "a float type, int8 or float8_e4m3fn", dtype)
    checks.same_device(h=h, V=V)


def _runs(h: Tensor, V: Tensor | None) -> bool:
    """Whether the kernels answer: there are rows, and those of the result fit a program."""
    return backend.resolve(h) == "triton" and len(h) > 0 and (h if V is None else V).shape[1] <= MAX_COLUMNS


@operator("project_normalize", differentiable=True)
def _op(h: Tensor, V: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, scales); no scales for dtypes that are not quantised."""
    quantized = dtype in checks.QUANTIZED
    _check(h, V, dtype)
    if not _runs(h, V):
        y = reference.project_normalize(h, V)
        return reference.quantize(y, dtype) if quantized else (y.to(dtype), y.new_empty(0))
    checks.fp8_runs("dtype", dtype, h.device)
    out = torch.empty(len(h), h.shape[1] if V is None else V.shape[1], dtype=dtype, device=h.device)
    scales = torch.empty(len(h) if quantized else 0, dtype=torch.float32, device=h.device)
    _launch("forward", h, V, {"out_ptr": out, "scale_ptr": scales if quantized else h}, LARGEST=reference.LARGEST.get(dtype, 0.0))
    return out, scales


@torch.library.register_fake("rerank_kernels::project_normalize")
def _(h: Tensor, V: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check(h, V, dtype)
    rows = h.shape[0]
    out = h.new_empty((rows, h.shape[1] if V is None else V.shape[1]), dtype=dtype)
    return out, h.new_empty(rows if dtype in checks.QUANTIZED else 0, dtype=torch.float32)


@operator("project_normalize_backward")
def _backward_op(grad: Tensor, h: Tensor, V: Tensor | None) -> Tensor:
    """dx, nnz × r, fp32."""
    if not _runs(h, V):
        return _through_norm(h.float() if V is None else h.float() @ V.float(), grad)
    dx = torch.empty_like(grad, dtype=torch.float32, memory_format=torch.contiguous_format)
    _launch("backward", h, V, {"grad_ptr": grad.float().contiguous(), "dx_ptr": dx})
    return dx


@torch.library.register_fake("rerank_kernels::project_normalize_backward")
def _(grad: Tensor, h: Tensor, V: Tensor | None) -> Tensor:
    return torch.empty_like(grad, dtype=torch.float32, memory_format=torch.contiguous_format)


def _through_norm(x: Tensor, grad: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    y, grad = x / norm.clamp(min=1e-12), grad.float()
    radial = torch.where(norm > 1e-12, (y * grad).sum(-1, keepdim=True), 0)
    dx: Tensor = (grad - y * radial) / norm.clamp(min=1e-12)
    return dx


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.mark_non_differentiable(output[1])


@exactly(tensors=False)
def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    h, V = ctx.saved_tensors
    dx = _backward_op(grad, h, V)
    if V is None:
        return dx.to(h.dtype), None, None
    return (dx @ V.float().T).to(h.dtype), (h.float().T @ dx).to(V.dtype), None


torch.library.register_autograd("rerank_kernels::project_normalize", _backward, setup_context=_setup)


def project_normalize(h: Tensor, V: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Token states on the model's subspace, at unit length: Vᵀh / ‖Vᵀh‖. Differentiable in h and V.

    Args:
        h: nnz × d, fp32, fp16 or bf16; on a GPU products run in this dtype with fp32 sums.
        V: d × r with orthonormal columns, or None for the identity.
        dtype: of the result: fp32, fp16 or bf16.

    Returns:
        nnz × r; a zero vector stays zero.

    Raises:
        ValueError: arguments that do not fit; the message names the argument and what it held.
    """
    checks.check(dtype in checks.FLOATS, "dtype", "float32, float16 or bfloat16", dtype)
    out: Tensor = _op(h, V, dtype)[0]
    return out


def project_quantize(h: Tensor, V: Tensor | None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """project_normalize's result as int8 or float8_e4m3fn rows (nnz × r) and their scales (nnz, fp32), in the same pass."""
    checks.check(dtype in checks.QUANTIZED, "dtype", "int8 or float8_e4m3fn", dtype)
    out, scales = _op(h, V, dtype)
    return out, scales


def _check_pool(h: Tensor, offsets: Tensor) -> None:
    checks.matrix("h", h)
    checks.offsets("offsets", offsets)
    checks.same_device(h=h, offsets=offsets)


@operator("pool_normalize", differentiable=True)
def _pool_op(h: Tensor, offsets: Tensor) -> Tensor:
    _check_pool(h, offsets)
    checks.rising(("offsets", offsets, len(h)))
    if not _runs(h, None) or len(offsets) == 1:
        return reference.pool_normalize(h, offsets)
    out = torch.empty(len(offsets) - 1, h.shape[1], dtype=torch.float32, device=h.device)
    config = configuration("pool", architecture(h.device), NAMES[h.dtype], h.shape[1], _columns(h.shape[1]), True)
    with on_device(h):
        _pool_kernel[(len(out),)](h.contiguous(), offsets.contiguous(), out, h.shape[1], config.block_m, config.block_n, num_warps=config.num_warps)
    return out


@torch.library.register_fake("rerank_kernels::pool_normalize")
def _(h: Tensor, offsets: Tensor) -> Tensor:
    _check_pool(h, offsets)
    return h.new_empty((offsets.shape[0] - 1, h.shape[1]), dtype=torch.float32)


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    h, offsets = ctx.saved_tensors
    lengths = offsets.diff()
    text = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int64, device=h.device), lengths, output_size=len(h))
    sums = torch.zeros(len(lengths), h.shape[1], dtype=torch.float32, device=h.device).index_add(0, text, h.float())
    mean = sums / lengths.clamp(min=1)[:, None]
    return (_through_norm(mean, grad) / lengths.clamp(min=1)[:, None])[text].to(h.dtype), None


torch.library.register_autograd("rerank_kernels::pool_normalize", _pool_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def pool_normalize(h: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each text's packed tokens, at unit length. Differentiable in h.

    Args:
        h: nnz × d, fp32, fp16 or bf16.
        offsets: N + 1, int64.

    Returns:
        N × d, fp32; zero for a text without tokens.

    Raises:
        ValueError: arguments that do not fit; the message names the argument and what it held.
    """
    out: Tensor = _pool_op(h, offsets)
    return out
