"""Forward MaxSim kernels of other packages, as variants that inspect compiles beside this package's own, where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .configs import Config, Variant

# Label: (package, module, kernel, whether every document's loop runs to the longest one's end).
KERNELS = {
    "LIK dense": ("late-interaction-kernels", "late_interaction_kernels.forward", "_maxsim_fwd_kernel", True),
    "LIK varlen": ("late-interaction-kernels", "late_interaction_kernels.varlen", "_varlen_fwd_kernel", True),
    "FM dense": ("flash-maxsim", "flash_maxsim.flash_maxsim", "_maxsim_fwd_kernel", True),
    "FM packed": ("flash-maxsim", "flash_maxsim.flash_maxsim_varlen", "_maxsim_packed_kernel", False),
}
Lq, Ld, N = 32, 160, 1000
# What their launchers pass for one query and fp16 documents of ragged length; equal to 1 is a constant to Triton too.
CONSTANTS = {
    "Lq": Lq, "Lq_bucket": Lq, "has_q_mask": False, "has_d_mask": True, "save_argmax": False, "SAVE_ARGMAX": False, "normalize": False, "kd_layout": False,
    "shared_docs": 1, "use_q_lengths": 0, "input_dtype": 0,
}  # fmt: skip
ONES = ("Nq", "stride_q_d", "stride_d_d", "stride_q_k", "stride_d_k", "stride_s_d", "stride_s_b", "stride_qm_l", "stride_dm_l")
SIXTEENS = ("max_lq", "lq_key", "stride_q_n", "stride_q_l", "stride_q_t", "stride_d_n", "stride_d_b", "stride_d_l", "stride_d_t")
POINTERS = {"Q_ptr": "*fp16", "D_ptr": "*fp16", "scores_ptr": "*fp32", "q_mask_ptr": "*i8", "d_mask_ptr": "*i8"}


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tiles(arch: str, d_pad: int) -> Config:
    """The first of the tiles they try for 32 query tokens that the GPU's shared memory holds; they choose among these by timing."""
    budget = (164 if arch == "sm_80" else 228) * 1024 - 8192
    tried = [Config(64, Lq, d_pad, 4, stages) for stages in ((2,) if arch == "sm_80" else (3, 2))]
    fits = [c for c in tried if (c.block_m + c.block_n) * d_pad * 2 * c.num_stages + c.block_m * c.block_n * 4 <= budget]
    return fits[0] if fits else Config(32, Lq, d_pad, 4, 2)


def _kernel(module: str, name: str) -> Any:
    kernel = getattr(import_module(module), name)
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):
        kernel = kernel.fn
    return kernel


def variants(arch: str) -> Iterator[Variant]:
    """Their forward kernels in fp16 at d = 128 and 384; one that cannot be imported, or has changed, has the exception as its kernel."""
    import triton.language as tl

    for label, (package, module, name, _) in KERNELS.items():
        if installed(package) is None:
            continue
        for d in (128, 384):
            d_pad = 1 << (d - 1).bit_length()
            config = _tiles(arch, d_pad)
            values = CONSTANTS | dict.fromkeys(ONES, 1) | {"d": d, "d_pad": d_pad, "BLOCK_Q": Lq, "BLOCK_D": config.block_m, "COMPUTE_DTYPE": tl.float16}
            signature: dict[str, str] = {}
            try:
                kernel = _kernel(module, name)
                for p in kernel.params:
                    if p.is_constexpr and p.name not in values:
                        raise TypeError(f"{name} has an argument {p.name} that is not known here")
                    fixed = p.name in values and (p.is_constexpr or p.name in ONES)
                    kind = "*i32" if p.name.endswith("_ptr") else "i32:16" if p.name in SIXTEENS else "i32"
                    signature[p.name] = "constexpr" if fixed else POINTERS.get(p.name, kind)
            except Exception as error:  # noqa: BLE001 - whatever another package's import or a changed kernel raises is its result
                kernel = error
            constants = {n: values[n] for n, kind in signature.items() if kind == "constexpr"}
            shape = f"1 query x {Lq} tokens, {N:,} documents x {Ld}, d {d}"
            yield Variant(label, "forward", "fp16", d, config, kernel, signature, constants, shape, 2.0 * d * (N * Ld + Lq) + 4 * N, 2.0 * N * Lq * Ld * d)


def tiles_over_needed(block: int, to_longest: bool, shortest: int = 20, longest: int = 300) -> float:
    """Document tiles computed over those needed, for one document of every length from shortest to longest."""
    needed = [-(-length // block) for length in range(shortest, longest + 1)]
    return max(needed) * len(needed) / sum(needed) if to_longest else 1.0
