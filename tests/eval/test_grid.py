"""--grid: a results folder for every combination, and every text encoded once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rerank_lab.cache.vectors import VectorCache
from rerank_lab.eval import grid
from rerank_lab.eval.__main__ import main
from rerank_lab.models.base import Detail, Vectors
from tests.conftest import DOCUMENTS, QUERIES
from tests.eval.test_eval import failing, load

BASE = 'methods = ["fast", "best"]\ncold-queries = 0\nno-kernel-check = true\n'


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The keys of all texts that were put into the cache, in order."""
    real, found = VectorCache.add, list[bytes]()

    def counted(self: VectorCache, keys: Sequence[bytes], vectors: Vectors, detail: Detail) -> None:
        found.extend(keys)
        real(self, keys, vectors, detail)

    monkeypatch.setattr(VectorCache, "add", counted)
    return found


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "grid.toml").write_text(text)
        return str(tmp_path / "grid.toml")

    return write


def test_every_combination_is_a_folder_and_equals_a_run_of_its_own(
    beir: Callable[..., Path], write: Callable[[str], str], tmp_path: Path, encoded: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = beir("a"), beir("b", documents={**DOCUMENTS, "d7": ("", "Nothing else.")})
    # The first cells need less detail than the last ones, and all read the same texts.
    axes = f'[grid]\ndataset = ["{a}", "{b}"]\nmax_tokens_per_doc = [4, 64]\nmethods = [["fast"], ["fast", "best", "standard"]]\n'
    out, file = tmp_path / "out", write(BASE.replace("methods", "measures").replace('"fast", "best"', '"nDCG@3"') + axes)
    assert main(["--grid", file, "--out", str(out)]) == 0
    assert len(encoded) == len(set(encoded)) == 2 * (len(DOCUMENTS) + 1) + len(QUERIES), "each text once for each number of tokens, and each query"
    about = json.loads((out / "grid.json").read_text())
    assert [list(cell["values"]) for cell in about["cells"]] == [["dataset", "max_tokens_per_doc", "methods"]] * 8
    names = [cell["name"] for cell in about["cells"]]
    assert names[0] == "a,max_tokens_per_doc=4,fast" and len(set(names)) == 8 == len([p for p in out.iterdir() if p.is_dir()])
    said = capsys.readouterr().out
    assert all(f"{name}: nDCG@3" in said.replace("\n    ", " ") for name in names) and max(map(len, said.split("\n\n")[0].splitlines())) <= 80
    alone = ["--dataset", str(b), "--max-tokens-per-doc", "64", "--methods", "fast,best,standard", "--measures", "nDCG@3", "--cold-queries", "0"]
    assert main([*alone, "--no-kernel-check", "--out", str(tmp_path / "alone")]) == 0
    own, cell = load(tmp_path / "alone"), load(out / "b,max_tokens_per_doc=64,fast+best+standard")
    assert [row["measures"] for row in own["rows"]] == [row["measures"] for row in cell["rows"]] and own["config"] == cell["config"]


def test_detail_is_shared_by_those_that_read_the_same(beir: Callable[..., Path], write: Callable[[str], str], tmp_path: Path) -> None:
    def wanted(text: str) -> list[Detail]:
        return list(grid.details(grid.read(Path(write(text)), [], tmp_path)[1]))

    assert wanted('[grid]\nmethods = [["fast"], ["best"], ["optimal"]]\n') == [Detail.STATES] * 3
    assert wanted('[grid]\nmethods = [["fast"], ["best:tau=0.05"]]\n') == [Detail.TOKENS] * 2
    assert wanted('methods = "best+cross"\n[grid]\nmodel_cross = ["minilm-cross", "none"]\n') == [Detail.STATES] * 2
    assert wanted('[grid]\nmethods = [["fast"], ["best"]]\nmax_tokens_per_doc = [8, 9]\n') == [Detail.TOKENS] * 4
    assert wanted('methods = "fast"\n[grid]\nprecision = ["fp32", "bf16"]\n') == [Detail.POOLED] * 2
    assert wanted("[grid]\ntau = 1\n".replace("tau = 1", 'split = ["test", "train"]')) == [Detail.STATES] * 2


def test_a_cell_that_fails_leaves_the_others_and_resume_does_it_again(
    beir: Callable[..., Path], write: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], encoded: list[bytes]
) -> None:
    good, later = beir("good"), beir("later")
    (later / "corpus.jsonl").write_text("no JSON\n")
    out, file = tmp_path / "out", write(f'{BASE}[grid]\ndataset = ["{later}", "{good}"]\n')
    assert main(["--grid", file, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "corpus.jsonl:1: not JSON" in said.err and "1 of 2 cells: later" in said.err and "--resume" in said.err
    assert "good: nDCG@10" in said.out and "later: not finished" in said.out and (out / "good" / "results.json").is_file()
    assert "holds a grid" in failing(capsys, "--grid", file, "--out", str(out))
    beir("later", documents={"x1": ("", "Another text."), "d1": DOCUMENTS["d1"]})
    before = (out / "good" / "results.json").read_bytes()
    assert main(["--grid", file, "--out", str(out), "--resume"]) == 0
    assert (out / "good" / "results.json").read_bytes() == before and (out / "later" / "results.json").is_file()
    other = write(f'{BASE}[grid]\ndataset = ["{good}"]\n')
    assert "another grid" in failing(capsys, "--grid", other, "--out", str(out), "--resume")
    (good / "corpus.jsonl").write_text("no JSON\n")
    assert main(["--grid", other, "--out", str(out), "--overwrite"]) == 2
    assert not (out / "later").exists() and not (out / "good" / "results.json").exists(), "nothing old is taken for new"
    assert main(["--grid", other, "--out", str(out), "--resume"]) == 2 and "not finished" in capsys.readouterr().out


def test_options_of_the_file_hold_for_the_run_too(beir: Callable[..., Path], write: Callable[[str], str], tmp_path: Path) -> None:
    file = write(f'{BASE}cache = "{tmp_path / "cache"}"\nout = "{tmp_path / "out"}"\n[grid]\ndataset = ["{beir()}"]\n')
    assert main(["--grid", file]) == 0
    assert (tmp_path / "out" / "small" / "results.json").is_file() and any((tmp_path / "cache" / "vectors").iterdir())


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (BASE, [], "no table [grid]"),
        ("[grid]\n", [], "no table [grid]"),
        ("[grid]\nmodle = ['a']\n", [], "modle cannot be an axis; valid: "),
        ("[grid]\nout = ['a']\n", [], "out cannot be an axis"),
        ("[grid]\ntop-k = 3\n", [], "must be a list of values"),
        ("[grid]\ntop-k = [3, 3]\n", [], "each once"),
        ("[grid]\ntop-k = [3, 4]\n", ["--top-k", "5"], "--top-k is an axis"),
        ("[grid]\nmethods = [['fast'], ['fats'], ['bset']]\n", [], "'fats' is not known"),
        ("topk = 1\n[grid]\ntop-k = [3]\n", [], "unknown keys topk"),
        ("[grid]\ntop-k = [0]\n", [], "at least 1"),
        ("[grid]\ntop-k = [3]\ntop_k = [4]\n", [], "twice, with - and with _"),
        ("top-k = 3\ntop_k = 4\n[grid]\nseed = [1]\n", [], "twice, with - and with _"),
        ("[grid]\nsplit = [2020-01-01]\n", [], "must be a number, a string"),
        ("[grid]\nmethods = [[['fast']]]\n", [], "must be a number, a string"),
        ("[grid]\ntop-k = [3, 4]\n", ["--top", "5"], "--top"),
        ("[grid\n", [], "grid.toml"),
    ],
)
def test_wrong_grids(text: str, flags: list[str], message: str, write: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failing(capsys, "--grid", write(text), "--out", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused_and_long_names_are_cut(
    beir: Callable[..., Path], write: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert "a file, not a folder" in failing(capsys, "--grid", write("[grid]\nseed = [1, 2]\n"), "--out", str(tmp_path / "file"))
    axes = {"candidates": "c" * 90, "model": "m" * 90, "subspace": "r" * 90}
    text = "[grid]\n" + "".join(f'{key} = ["{value}", "{value}2"]\n' for key, value in axes.items())
    names = [cell.name for cell in grid.read(Path(write(text)), [], tmp_path)[1]]
    assert max(map(len, names)) <= 125 and len(set(names)) == 8
