"""Budgets of what the compiler makes of the kernels, without a GPU: nothing spilled, warp-group MMA, blocks resident, no tile too many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from rerank_kernels import inspect, inspect_peers
from rerank_kernels.configs import Config, Variant
from tests.conftest import ROOT

Row = dict[str, Any]
OPERATORS = ("similarity_topk", "subspace_attention")  # which have budgets of their own
SASS = """\
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0020*/                   HGMMA.64x32x16.F32 R24, gdesc[UR4], !UPT ;
        /*0030*/              @UP1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0070*/                   UBLKCP [UR8], [UR4], UR6 ;
"""
LOG = """\
ptxas info    : Compiling entry function '_k' for 'sm_90a'
ptxas info    : Function properties for _k
    16 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers
"""


def run(*arguments: str, path: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The command as a user calls it, with no tuned configurations; the tests' interpreter does not reach its workers."""
    env = os.environ | {"RERANK_KERNELS_CONFIGS": os.devnull + "/none", "PYTHONPATH": os.pathsep.join([*path, str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "rerank_kernels.inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def rows_of(*arguments: str, path: Sequence[str] = ()) -> list[Row]:
    done = run(*arguments, "--no-peers", "--json", path=path)
    assert done.returncode == 0, done.stderr
    rows: list[Row] = json.loads(done.stdout)["rows"]
    assert rows
    return rows


def named(rows: Sequence[Row]) -> list[str]:
    facts = ("registers", "stack_bytes", "spill_bytes", "blocks_per_sm", "mma")
    return [" ".join(str(r[k]) for k in ("op", "direction", "arch", "dtype", "d", "config")) + f": {[r[k] for k in facts]}" for r in rows]


def nothing_spilled(rows: Sequence[Row]) -> None:
    assert not named([r for r in rows if r["stack_bytes"] or r["spill_bytes"]])
    assert not named([r for r in rows if r["blocks_per_sm"] < 1])


def hopper_budgets(rows: Sequence[Row]) -> None:
    forward = [r for r in rows if r["arch"] == "sm_90" and r["op"] in OPERATORS and r["direction"] == "forward"]
    fp16 = [r for r in forward if r["dtype"] == "fp16"]
    assert {(r["op"], r["d"]) for r in fp16} >= {(op, d) for op in OPERATORS for d in (128, 384)}
    assert not named([r for r in fp16 if not r["mma"].get("HGMMA")])
    assert not named([r for r in forward if r["dtype"] != "fp32" and r["blocks_per_sm"] < {128: 4, 384: 2}.get(r["d"], 1)])


@pytest.fixture(scope="module")
def hopper() -> list[Row]:
    return rows_of("--arch", "sm_90")


def test_hopper_holds_its_budgets(hopper: list[Row]) -> None:
    assert {r["op"] for r in hopper} >= {*inspect.COMPILED, *OPERATORS, "contrast_score", "project_normalize", "pool_normalize"}
    nothing_spilled(hopper)
    hopper_budgets(hopper)


def test_ampere_and_blackwell_spill_nothing_either() -> None:
    rows = rows_of("--arch", "sm_80,sm_100", "--dtype", "fp16", "--direction", "forward", "--op", ",".join(OPERATORS))
    assert {(r["arch"], r["op"]) for r in rows} == {(arch, op) for arch in ("sm_80", "sm_100") for op in OPERATORS}
    nothing_spilled(rows)
    assert not named([r for r in rows if not r["mma"].get("HMMA" if r["arch"] == "sm_80" else "UTCHMMA")])


def test_the_table_fits_a_terminal(hopper: list[Row]) -> None:
    text = inspect.table([*hopper, hopper[0] | {"error": "CompilationError: no"}])
    assert text.startswith("sm_90: H100 SXM, 3.35 TB/s") and "does not compile: CompilationError: no" in text
    assert not [line for line in text.splitlines() if len(line) > 80]
    assert all(f"{r['op']} {r['direction']}: " in text and str(r["config"]) in text for r in hopper)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["3.6.0", "3.7.1"])
def test_a_release_of_triton_spills_nowhere_and_interprets_alike(release: str, tmp_path: Path) -> None:
    path = []
    if version("triton") != release:
        older = ["numpy<2.4"] if release < "3.7" else []  # its interpreter takes numbers out of arrays in a way that numpy 2.4 refuses
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), f"triton=={release}", *older]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"triton {release} cannot be installed: {done.stderr.strip()[-200:]}")
        path = [str(tmp_path)]
    rows = rows_of(path=path)
    nothing_spilled(rows)
    hopper_budgets(rows)
    tests = [f"tests/kernels/test_{module}.py" for module in inspect.MODULES]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", *tests], capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_75"], "'sm_75' is not one of sm_80, sm_90, sm_100"),
        (["--op", "subspace"], "'subspace' is not one of similarity_topk"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_wrong_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        inspect.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "blocks"),
    [
        (("sm_90", 64, 0, 128), 8),
        (("sm_90", 255, 0, 256), 1),
        (("sm_90", 168, 0, 128), 3),  # 12 warps, 3 on each scheduler
        (("sm_90", 32, 0, 1024), 2),
        (("sm_90", 16, 0, 32), 32),
        (("sm_90", 32, 227 * 1024, 128), 1),
        (("sm_90", 32, 113 * 1024, 128), 2),
        (("sm_80", 32, 163 * 1024, 128), 1),
        (("sm_80", 32, 164 * 1024, 128), 0),
        (("sm_100", 32, 0, 128, 128), 4),
    ],
)
def test_resident_blocks_are_those_of_the_occupancy_calculator(found: tuple[Any, ...], blocks: int) -> None:
    assert inspect.resident_blocks(*found) == blocks


def test_what_the_tools_print_is_read() -> None:
    assert inspect.resources(LOG) == (70, 16, 32)
    with pytest.raises(ValueError, match="no registers or stack: fatal"):
        inspect.resources("fatal")
    assert inspect.instructions(SASS) == {"mma": {"HGMMA": 1, "HMMA": 2, "UTCHMMA": 1}, "async_copies": 1, "bulk_copies": 2}


@pytest.mark.parametrize(
    ("moved", "flops", "blocks", "expected"),
    [
        (3.35e6, 0.0, 8, ("memory", 1e-6, 1.0, 0.0)),
        (3.35e6, 989e6 / 4, 8, ("memory", 1e-6, 1.0, 0.25)),
        (3.35e6, 989e6 * 2, 8, ("matrix", 2e-6, 0.5, 1.0)),
        # One block asks for 64 x 64 fp16 in 500 ns: 132 multiprocessors then take 2.16 of 3.35 TB/s.
        (3.35e6, 0.0, 1, ("memory", 3.35 / (8192 * 132 / 500e-9 / 1e12) * 1e-6, 8192 * 132 / 500e-9 / 3.35e12, 0.0)),
    ],
)
def test_the_bound_is_the_longer_of_memory_and_arithmetic(moved: float, flops: float, blocks: int, expected: tuple[str, float, float, float]) -> None:
    variant = Variant("op", "forward", "fp16", 64, Config(64, 32, 64, 4, 2), None, {}, {}, "shape", moved, flops)
    found = inspect.bound(variant, "sm_90", blocks, True)
    assert found["by"] == expected[0]
    assert [found["seconds"], found["bandwidth_share"], found["matrix_share"]] == pytest.approx(expected[1:])


def test_a_peer_whose_kernel_is_gone_is_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"P": ("pytest", "no_such_module", "kernel", True), "Q": ("no-such-package", "x", "y", False), "R": ("pytest", "json", "kernel", False)}
    monkeypatch.setattr(inspect_peers, "KERNELS", gone)
    variants = list(inspect_peers.variants("sm_90"))
    assert [(v.op, v.d) for v in variants] == [("P", 128), ("P", 384), ("R", 128), ("R", 384)]
    kinds: list[type[Exception]] = [ModuleNotFoundError, AttributeError]
    for v, kind in zip(variants[::2], kinds):
        with pytest.raises(kind):
            inspect.measure(v, "sm_90")


def test_loops_to_the_longest_document_compute_tiles_too_many() -> None:
    assert inspect_peers.tiles_over_needed(64, to_longest=False) == 1.0
    assert inspect_peers.tiles_over_needed(64, to_longest=True, shortest=64, longest=65) == pytest.approx(4 / 3)
    assert inspect_peers.tiles_over_needed(64, to_longest=True) > 1.6


@pytest.mark.parametrize(("arch", "d"), [("sm_90", 16), ("sm_100", 32), ("sm_80", 100), ("sm_100", 768)])
def test_other_widths_compile_too(arch: str, d: int) -> None:
    """Also where one step is the whole width, and where an argument is 1, which Triton makes a constant."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arch, str(d)], capture_output=True, text=True, env=env | {"PYTHONPATH": str(ROOT / "kernels")}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


COMPILE = """
import sys
from dataclasses import replace
from rerank_kernels import inspect
from rerank_kernels.similarity_topk import _constants, configuration, variants
from rerank_kernels.subspace_attention import variants as attention

arch, d = sys.argv[1], int(sys.argv[2])
ours = next(v for v in variants(arch) if v.dtype == "fp16")
config = configuration(arch, "fp16", d)
ours = replace(ours, d=d, config=config, constants=_constants(config, "fp16", d, 10, "cosine", d == 32, d == 100))
inspect.measure(ours, arch)
if d == 16:
    for name in ("N", "B", "tiles"):
        inspect.measure(replace(ours, signature=ours.signature | {name: "constexpr"}, constants=ours.constants | {name: 1}), arch)
for direction in ("forward", "backward"):
    v = next(v for v in attention(arch) if v.dtype == "fp16" and v.direction == direction)
    inspect.measure(replace(v, constants=v.constants | {"D": d}), arch)
"""

COUNT = """
import json, torch
from triton.runtime import interpreter
from rerank_kernels.backend import use_backend
from rerank_kernels.subspace_attention import configuration, subspace_attention

calls, dot = [], interpreter.InterpreterBuilder.create_dot
def counted(self, *arguments, **named):
    calls.append(1)
    return dot(self, *arguments, **named)
interpreter.InterpreterBuilder.create_dot = counted
found = []
for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
    for Lq, d in ((32, 128), (20, 384)):
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(20, 301, (12,), generator=random)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        normalized = lambda n: torch.nn.functional.normalize(torch.randn(n, d, generator=random), dim=-1).to(dtype)
        pairs = torch.stack([torch.zeros(12, dtype=torch.int64), torch.arange(12)], 1)
        calls.clear()
        with use_backend("triton"):
            subspace_attention(normalized(Lq), torch.tensor([0, Lq]), normalized(int(offsets[-1])), offsets, pairs)
        c = configuration("forward", "sm_90", name, d, Lq)
        needed = sum(-(-n // c.block_m) for n in lengths.tolist()) * -(-d // c.block_d) * -(-Lq // c.block_n)
        found.append((len(calls), needed))
print(json.dumps(found))
"""


def test_no_document_tile_is_computed_that_its_length_does_not_need() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "RERANK_KERNELS_CONFIGS": os.devnull + "/none", "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4
    assert all(0 < needed <= computed <= 1.05 * needed for computed, needed in found), found
