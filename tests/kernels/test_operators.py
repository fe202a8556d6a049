"""The table of operators is whole, and the package needs neither its name nor its place: a copy with a toy operator, one file and one line of the table more."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import rerank_kernels
from rerank_kernels import BACKENDS, OPERATORS, cpu, inspect, reference, tune
from rerank_kernels.bench_timing import tasks
from rerank_kernels.configs import NAMES
from rerank_kernels.names import ARCHS
from tests.conftest import DEVICE, ROOT

PACKAGE = ROOT / "kernels" / "rerank_kernels"
FILES = {operator.module for operator in OPERATORS.values()}
COPY = "moved"  # the copy's name


def text_of(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_each_operator_is_defined_documented_and_tested() -> None:
    defined = {name: "quantize" if name == "project_quantize" else name.rstrip("_") for name in OPERATORS}
    assert [name for name, definition in defined.items() if not callable(getattr(reference, definition, None))] == []
    documented = [line.split("|")[1] for line in text_of("docs", "kernels.md").splitlines() if re.match(r"\| `\w+\(", line)]
    assert sorted(re.findall(r"`(\w+)\(", "".join(documented))) == sorted(OPERATORS)
    assert [name for name in FILES if not ROOT.joinpath("tests", "kernels", f"test_{name}.py").is_file()] == []
    ambient = text_of("tests", "kernels", "ambient_runs.py")
    assert [name for name in OPERATORS if f"k.{name}(" not in ambient] == []


def test_the_package_offers_what_the_table_says() -> None:
    offered = {**{name: operator.module for name, operator in OPERATORS.items()}, **rerank_kernels.OTHERS}
    [block] = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == offered
    assert {*vars(rerank_kernels)["__all__"]} == {"BACKENDS", *offered} <= {*dir(rerank_kernels)}
    assert all(callable(getattr(rerank_kernels, name)) for name in OPERATORS)


def test_files_declare_what_the_table_says_of_them() -> None:
    declares = {name: {path.stem for path in PACKAGE.glob("*.py") if f"\ndef {name}(" in path.read_text()} for name in ("variants", "workload")}
    assert declares["variants"] - {inspect.PEERS} == {operator.module for operator in OPERATORS.values() if operator.compiled} == {*inspect.MODULES}
    assert declares["workload"] == {operator.module for operator in OPERATORS.values() if operator.tuned}
    for arch in ARCHS:
        variants = [v for file in inspect.MODULES for v in import_module(f"rerank_kernels.{file}").variants(arch)]
        assert {v.op for v in variants} >= {*inspect.COMPILED}
        assert {v.op for v in variants if v.dtype in NAMES.values()} >= {*tune.TUNED}
    timed = tasks(quick=True, cuda=False)
    assert {type(task).__module__.rpartition(".")[2] for task in timed} == {operator.bench for operator in OPERATORS.values() if operator.bench}
    for task in timed:
        calls = task.on_cpu(task.tensors())
        assert next(iter(calls)) == task.ours[0] and {*task.unlike} <= {*task.ours} <= {*calls}


def test_no_file_imports_the_package_by_its_name() -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("rerank_kernels"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("rerank_kernels") for alias in node.names))
    ]
    assert found == []


TOY = '''
"""A number times each row: y = a x."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import backend, reference
from .backend import on_device, operator, tl, triton
from .bench_tasks import Task
from .configs import NAMES, Config, Variant, architecture, key, tuned
from .samples import seeded, unit


@triton.jit
def _kernel(x_ptr, out_ptr, a, count, BLOCK_M: tl.constexpr):
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < count, other=0.0) * a, mask=at < count)


def configuration(arch, dtype, d):
    return tuned().get(key("toy", "forward", arch, dtype, d)) or Config(64, 1, 16, 4, 1)


def variants(arch):
    config, types = configuration(arch, "fp32", 64), {"x_ptr": "*fp32", "out_ptr": "*fp32", "a": "fp32", "count": "i32", "BLOCK_M": "constexpr"}
    yield Variant("toy", "forward", "fp32", 64, config, _kernel, types, {"BLOCK_M": config.block_m}, "1,000 rows, d 64", 1000 * 64 * 8, 0)


def workload(variant, device, rows):
    x = unit(rows, variant.d, seeded()).to(device)
    return lambda: toy(x, 2.0)


@operator("toy")
def _op(x: torch.Tensor, a: float) -> torch.Tensor:
    if backend.resolve(x) != "triton":
        return reference.toy(x, a)
    out, config = torch.empty_like(x), configuration(architecture(x.device), NAMES[x.dtype], x.shape[1])
    with on_device(x):
        _kernel[(triton.cdiv(x.numel(), config.block_m),)](x, out, a, x.numel(), config.block_m, num_warps=config.num_warps)
    return out


def toy(x, a):
    return _op(x, a)


def tasks(quick, cuda):
    yield Scaling(64)


@dataclass(frozen=True)
class Scaling(Task):
    rows: int

    ours, matrix, tolerance, products = ("toy",), "x", 1e-6, 1

    def tensors(self):
        return {"x": unit(self.rows, 64, seeded())}

    def title(self, x):
        return f"a number times {self.rows} rows"

    def on_cpu(self, x):
        return {"toy": lambda: toy(x["x"], 2.0), "torch": lambda: x["x"] * 2.0}

    on_gpu = on_cpu
'''


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a copy of the package under another name, with the toy."""
    folder = tmp_path_factory.mktemp("elsewhere")
    copy = folder / COPY
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "toy.py").write_text(TOY.lstrip())
    with (copy / "reference.py").open("a") as file:
        file.write("\n\ndef toy(x, a):\n    return x * a\n")
    table = (copy / "__init__.py").read_text()
    assert table.count("OPERATORS = {\n") == 1
    (copy / "__init__.py").write_text(table.replace("OPERATORS = {\n", 'OPERATORS = {\n    "toy": Operator("toy", compiled=True, tuned=True, bench="toy"),\n'))
    return folder


def run(moved: Path, code: str, *arguments: str) -> Any:
    """What code prints as JSON, in a process that can import neither rerank_kernels nor rerank_lab."""
    env = os.environ | {"PYTHONPATH": str(moved), "RERANK_KERNELS_CONFIGS": os.devnull + "/none"}
    alone = "import sys; sys.modules['rerank_kernels'] = sys.modules['rerank_lab'] = None\n"
    done = subprocess.run([sys.executable, "-c", alone + code, *arguments], cwd=moved, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CALLS = """
import importlib.util, json, sys
import torch

spec = importlib.util.spec_from_file_location("x1f3e", sys.argv[1], submodule_search_locations=[sys.argv[1].rpartition("/")[0]])
k = importlib.util.module_from_spec(spec)
sys.modules["x1f3e"] = k
spec.loader.exec_module(k)
from x1f3e import cpu, reference

x, at, pairs = torch.nn.functional.normalize(torch.randn(9, 8), dim=-1), torch.tensor([0, 4, 9]), torch.tensor([[0, 1], [1, 0]])
gaps = {"subspace_attention": k.subspace_attention(x, at, x, at, pairs) - reference.subspace_attention(x, at, x, at, pairs)}
gaps["similarity_topk"] = k.similarity_topk(x[:2], x, 3)[0] - reference.similarity_topk(x[:2], x, 3)[0]
gaps["pool_normalize"] = k.pool_normalize(x, at) - reference.pool_normalize(x, at)
for backend in sys.argv[2:]:
    with k.use_backend(backend):
        gaps[f"toy, {backend}"] = k.toy(x, 3.0) - reference.toy(x, 3.0)
print(json.dumps({"gaps": {name: float(gap.abs().max()) for name, gap in gaps.items()}, "cpu": cpu.implementation()}))
"""


def test_a_copy_under_any_name_computes_the_same(moved: Path) -> None:
    backends = [name for name in BACKENDS if name != "triton" or DEVICE.type == "cpu"]  # its tensors are on the CPU
    found = run(moved, CALLS, str(moved / COPY / "__init__.py"), *backends)
    assert found["cpu"] == cpu.implementation()
    assert len(found["gaps"]) == 3 + len(backends) and max(found["gaps"].values()) <= 2e-6


COMMAND = f"""
import runpy
sys.argv[0] = "command"
runpy.run_module("{COPY}." + sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_a_toy_is_inspected(moved: Path) -> None:
    [row] = run(moved, COMMAND, "inspect", "--op", "toy", "--arch", "sm_90", "--no-peers", "--json")["rows"]
    assert (row["op"], row["dtype"], row["config"]) == ("toy", "fp32", "64x1x16/4/1") and row["registers"] > 0 and "error" not in row


def test_a_toy_is_timed(moved: Path) -> None:
    only = f"import {COPY}; [{COPY}.OPERATORS.pop(name) for name in [*{COPY}.OPERATORS] if name != 'toy']\n"
    [task] = run(moved, f"{only}from {COPY}.bench import main; main(['--device', 'cpu', '--quick', '--json'])")["tasks"]
    assert task["task"] == "a number times 64 rows"
    assert [(row["name"], row["status"], row["wrong"]) for row in task["rows"]] == [("toy", "ok", False), ("torch", "ok", False)]


TUNING = f"""
import json
import torch
from {COPY} import tune, tuning
from {COPY}.configs import tuned

def timer(call):
    call()
    [config] = tuned().values()
    return config.block_m + config.block_d + config.num_warps + config.num_stages

found = tuning.run(["toy"], torch.device(sys.argv[1]), timer, rows=2)
print(json.dumps([tune.TUNED, {{name: str(config) for name, config in found.items()}}]))
"""


def test_a_toy_is_tuned(moved: Path) -> None:
    known, found = run(moved, TUNING, DEVICE.type)
    assert known == ["toy", *tune.TUNED]
    assert [name.split("/")[:2] + name.split("/")[3:] for name in found] == [["toy", "forward", "fp32", "64"]] and [*found.values()] == ["32x1x16/4/1"]
