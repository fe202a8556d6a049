"""What a process has set of torch and numpy reaches no result: every tensor names its type and its place, and what else there is is kept out."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import rerank_kernels as k
from rerank_kernels import cpu
from rerank_kernels.ambient import exact
from tests.conftest import ROOT, offsets, unit
from tests.kernels.ambient_runs import SETTINGS

MAKERS = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "Embedding", "LayerNorm", "Linear", "skip_init",
}  # fmt: skip
NAMED = {"NEW"}  # dicts that hold both, as one_way.py's


def nameless(source: str) -> Iterator[str]:
    """Calls that make a tensor and leave its type or its place to the process."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        given = {word.arg for word in node.keywords} | {ast.unparse(word.value) for word in node.keywords if word.arg is None}
        if node.func.attr in MAKERS and owner in ("torch", "nn", "nn.utils", "torch.nn") and not {"dtype", "device"} <= given and not given & NAMED:
            yield f"{node.lineno}: {ast.unparse(node)}"
        if owner == "torch" and node.func.attr.endswith("Tensor"):
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("package", ["kernels/rerank_kernels", "rerank_lab"])
def test_every_new_tensor_names_its_type_and_its_place(package: str) -> None:
    found = {str(path.relative_to(ROOT)): [*nameless(path.read_text(encoding="utf-8"))] for path in sorted((ROOT / package).rglob("*.py"))}
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_the_check_sees_what_it_is_for() -> None:
    source = (
        "torch.zeros(3)\ntorch.tensor([1.0], dtype=torch.float32)\nnn.Linear(2, 3)\ntorch.FloatTensor(3)\ntorch.ones(2, **NEW)\ntorch.eye(2, dtype=t, device=d)"
    )
    assert [line.partition(":")[0] for line in nameless(source)] == ["1", "2", "3", "4"]


@cache
def differing() -> dict[str, list[str]]:
    """By setting: results that are not those of a process that has set nothing. In a process of its own, which may crash."""
    done = subprocess.run([sys.executable, "-m", "tests.kernels.ambient_runs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_are_the_same_to_the_bit_whatever_is_set(setting: str) -> None:
    assert differing()[setting] == []


def test_products_are_exact_until_the_last_thread_is_done() -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with exact():
            entered.set()
            leave.wait(10)
            seen.append(matmul.fp32_precision)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        with exact(), exact(tensors=False):
            pass
        leave.set()
        thread.join()
        assert seen == ["ieee"] and torch.get_float32_matmul_precision() == "medium" and matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(3), torch.zeros(8)[::2], torch.zeros(4, device="meta"), torch.complex(unit(1, 4).cpu(), unit(1, 4).cpu())[0].conj().imag],
    ids=["type", "size", "strides", "place", "negated"],
)  # fmt: skip
def test_the_c_library_gets_no_buffer_that_it_would_leave(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"out is not what the C library takes \(torch.float32, 4 or more in a row, on the CPU\)"):
        cpu._floats("out", x, 4)


@pytest.mark.skipif(cpu.implementation() == "torch", reason="no C library here")
def test_negated_views_and_narrow_rows_are_computed_as_they_read() -> None:
    x = torch.complex(unit(6, 8).cpu(), unit(6, 8, 1).cpu())
    q, plain, at, pairs = x.conj().imag, x.conj().imag.clone(), offsets(2, 4).cpu(), torch.tensor([[0, 1], [1, 0]])
    assert q.is_neg() and not plain.is_neg()
    assert torch.equal(k.subspace_attention(q, at, q, at, pairs), k.subspace_attention(plain, at, plain, at, pairs))
    assert torch.equal(k.similarity_topk(q, q, 3)[0], k.similarity_topk(plain, plain, 3)[0])
    assert torch.equal(k.packed_attention(q, q, q, at, at, 2), k.packed_attention(plain, plain, plain, at, at, 2))
    column = unit(6, 5).cpu()[:, 2:3]  # whose rows are five apart
    plain = column.clone()
    assert torch.equal(k.packed_attention(column, column, column, at, at, 1), k.packed_attention(plain, plain, plain, at, at, 1))
