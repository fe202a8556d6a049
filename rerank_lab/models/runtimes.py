"""The runtimes of transformers, and the precisions of each. Imports nothing, so that --help needs no torch."""

from __future__ import annotations

PRECISIONS = ("fp32", "bf16", "int8")
RUNTIMES = {"torch": ("fp32", "bf16"), "compile": ("fp32", "bf16", "int8"), "onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16")}
