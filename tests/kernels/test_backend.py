"""Which implementation answers, launch configurations, and the tuned ones of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rerank_kernels import backend, configs, cpu, names, reference, similarity_topk, subspace_attention, tune, tuning, use_backend
from rerank_kernels.configs import Config
from rerank_kernels.subspace_attention import configuration, variants
from tests.conftest import DEVICE, offsets, unit


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No tuned configurations but a test's own."""
    monkeypatch.setenv("RERANK_KERNELS_CONFIGS", str(tmp_path / "configs.json"))
    configs.tuned.cache_clear()
    yield tmp_path / "configs.json"
    configs.tuned.cache_clear()


def test_each_backend_answers_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    inner = reference.subspace_attention

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(reference, "subspace_attention", watched("reference", inner))
    monkeypatch.setattr(cpu, "native_attention", watched("cpu", cpu.native_attention))
    arguments = unit(3, 8), offsets(3), unit(9, 8), offsets(4, 5), torch.tensor([[0, 0], [0, 1]], device=DEVICE)
    for name in backend.BACKENDS:
        if name == "cpu" and DEVICE.type != "cpu":
            continue
        with use_backend(name):
            torch.testing.assert_close(subspace_attention(*arguments), inner(*arguments))
    assert called == (["cpu", "reference", "cpu"] if DEVICE.type == "cpu" else ["reference"])


def test_a_choice_ends_with_its_block_and_wrong_ones_say_what_is_valid() -> None:
    with pytest.raises(ValueError, match="auto, reference, cpu, triton, not 'cuda'"), use_backend("cuda"):
        pass
    with use_backend("reference"):
        with pytest.raises(RuntimeError), use_backend("triton"):
            raise RuntimeError
        assert backend.resolve(unit(1, 1)) == "reference"
    assert backend.resolve(unit(1, 1)) == {"cpu": "cpu", "cuda": "triton"}[DEVICE.type]


def test_a_backend_that_cannot_run_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(ValueError, match=r"CUDA tensors, not on cpu .TRITON_INTERPRET=1"):
        similarity_topk(torch.ones(1, 2), torch.ones(3, 2), 1)
    with use_backend("cpu"), pytest.raises(ValueError, match="CPU tensors, not on meta"):
        backend.resolve(torch.empty(0, device="meta"))


def test_without_triton_the_cpu_still_answers() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, rerank_kernels as k\n"
        "values, index = k.similarity_topk(torch.eye(2), torch.eye(2), 1)\n"
        "assert index.tolist() == [[0], [1]]\n"
        "k.contrast_score(torch.ones(2), torch.arange(3), torch.tensor([0, 2]), torch.ones(2)); k.project_normalize(torch.eye(2), None)\n"
        "try:\n    with k.use_backend('triton'): k.similarity_topk(torch.eye(2), torch.eye(2), 1)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "backend 'triton' needs the package triton, which is not installed"), done.stderr


def test_every_architecture_dtype_width_and_query_has_a_configuration() -> None:
    for arch in names.ARCHS:
        for dtype in configs.NAMES.values():
            for d in (1, 64, 100, 384, 1024):
                for Lq in (1, 16, 17, 512):
                    config = configuration("forward", arch, dtype, d, Lq)
                    assert config.block_n <= max(16, Lq) or config.block_n == 32


def test_a_tuned_configuration_takes_the_place_of_the_tables(file: Path) -> None:
    config = Config(32, 32, 32, 4, 1)
    tuning.write(file, {configs.key("subspace_attention", "forward", "sm_90", "fp16", 128): config}, "a GPU")
    configs.tuned.cache_clear()
    assert configuration("forward", "sm_90", "fp16", 128, 32) == config != configuration("forward", "sm_80", "fp16", 128, 32)
    tuning.write(file, {"other": config}, "another GPU")
    assert len(json.loads(file.read_text())["configs"]) == 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"configs": {"x": {"block_m": 1}}}',
        '{"configs": 3}',
        '{"configs": {"x": {"block_m": "a", "block_n": 1, "block_d": 1, "num_warps": 1, "num_stages": 1}}}',
    ],
)
def test_a_broken_file_of_configurations_is_named(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ValueError, match=r"configs\.json is no file of tuned configurations .*: delete it"):
        configs.tuned()
    with pytest.raises(SystemExit) as end:
        tune.main([])
    assert end.value.code == 2


def test_a_folder_in_the_place_of_the_file_is_named(file: Path) -> None:
    file.mkdir()
    with pytest.raises(ValueError, match="no file of tuned configurations"):
        configs.tuned()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU")
def test_tune_without_a_gpu_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 1
    assert "there is no GPU here" in capsys.readouterr().err


def test_tune_keeps_the_fastest_of_what_can_be_launched_and_all_candidates_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with a clock that likes wide steps: every candidate is launched, and gives the same values."""
    chosen = [v for v in variants("sm_90") if (v.dtype, v.d, v.direction) == ("fp16", 128, "forward")][:1]
    module = sys.modules["rerank_kernels.subspace_attention"]
    monkeypatch.setattr(module, "variants", lambda arch: chosen)
    name = configs.key("subspace_attention", "forward", configs.architecture(DEVICE), "fp16", 128)
    outputs: list[torch.Tensor] = []

    def timer(call: tuning.Call) -> float:
        config = configs.tuned()[name]
        if config.num_stages == 4:
            raise RuntimeError("out of shared memory")
        if config.num_warps == 4 and config.num_stages == 2:
            outputs.append(call())  # type: ignore[arg-type]
        return 1 / config.block_d + config.num_warps / 1000 + config.num_stages / 10000 + config.block_m / 1e6

    found = tuning.run(["subspace_attention"], DEVICE, timer, rows=1)
    assert found == {name: Config(32, 32, 128, 4, 1)}
    assert len(outputs) == 12 and configs.tuned() == {}
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("command", ["bench", "inspect", "tune"])
def test_help_teaches_in_80_columns(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"rerank_kernels.{command}", "--help"], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert "xit code" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
