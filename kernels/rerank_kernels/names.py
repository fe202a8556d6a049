"""What people name on a command line. Imports nothing, so that --help needs no torch."""

from __future__ import annotations

BACKENDS = ("auto", "reference", "cpu", "triton")
ARCHS = ("sm_80", "sm_90", "sm_100")
DTYPES = ("fp32", "fp16", "bf16", "int8", "fp8")
