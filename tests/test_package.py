"""The project as it is installed: a wheel, used from another folder, and sources that older Pythons read."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

SOURCES = sorted(p for folder in ("rerank_lab", "kernels", "experiments", "tests") for p in (ROOT / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_both_packages_their_data_and_no_kernels_folder(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"rerank_lab", "rerank_kernels"}
    tracked = subprocess.run(["git", "ls-files", "rerank_lab", "kernels/rerank_kernels"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {t.removeprefix("kernels/") for t in tracked} <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_an_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    code = (
        "import rerank_lab, rerank_kernels; from rerank_lab import Reranker; from rerank_lab.datasets import load_dataset;"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in (rerank_lab, rerank_kernels)), rerank_lab.__file__;"
        "r = Reranker(); assert r.encoder.subspace is not None;"
        "print(r.rank('dot product', ['a cat', 'inner product of two vectors'])[0].index, len(load_dataset('numpydoc').queries))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"1 \d+\n", done.stdout)


def test_constraints_pin_every_dependency_to_what_is_tested() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {Requirement(line).name.lower().replace("_", "-"): Requirement(line) for line in lines if line}
    for requirement in map(Requirement, requires("rerank_lab") or []):
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", "offline", "report", "dev")):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name == "rerank-lab":
            continue
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(version(name)), f"{name} {version(name)} is outside of pyproject's range"
        if pins[name].marker is None or pins[name].marker.evaluate():  # type: ignore[union-attr]
            assert pins[name].specifier.contains(version(name)), f"{name} {version(name)} is not the pinned one"


def test_no_file_is_over_400_lines() -> None:
    assert [p.name for p in SOURCES if len(p.read_text().splitlines()) > 400] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_sources_parse_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))


@pytest.mark.slow
@pytest.mark.parametrize("minor", [10, 12, 13])
def test_other_pythons_compile_the_sources(minor: int, tmp_path: Path) -> None:
    python = f"python3.{minor}"
    if subprocess.run([python, "--version"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"no {python} here")
    code = "import sys; [compile(open(p, encoding='utf-8').read(), p, 'exec') for p in sys.argv[1:]]"
    subprocess.run([python, "-c", code, *map(str, SOURCES)], check=True)
