"""python -m rerank_lab.cache: lists what is there, and deletes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rerank_lab.cache.__main__ import main
from rerank_lab.cache.places import BESIDE, PLANS
from rerank_lab.cache.store import Store
from rerank_lab.cache.vectors import VectorCache
from rerank_lab.datasets.corpus import Corpus
from rerank_lab.eval.__main__ import main as evaluation
from rerank_lab.models.base import Detail
from rerank_lab.models.bi_encoder import BiEncoder
from tests.cache.test_cache import get, made, shards


@pytest.fixture
def filled(tmp_path: Path, encoder: BiEncoder) -> Path:
    """A real model's vectors in one shard, and another's in two, one of them not used for forty days."""
    get(encoder, VectorCache(encoder.key(), tmp_path, about=encoder.about()))
    for seed in range(2):
        VectorCache("other", tmp_path).add(*made(seed), Detail.TOKENS)
    (tmp_path / "vectors" / "other" / "about.json").unlink()
    os.utime(shards(tmp_path / "vectors" / "other")[0], (time.time() - 40 * 86400,) * 2)
    return tmp_path


def test_info_tells_each_model_its_bytes_and_last_use(filled: Path, encoder: BiEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--cache", str(filled)]) == 0
    out = capsys.readouterr().out
    assert encoder.key() in out and "all-MiniLM-L6-v2 (fp32, 128 dimensions a token)" in out and "1 file, last used just now" in out
    assert "unknown model" in out and "2 files" in out
    total = sum(path.stat().st_size for path in shards(filled))
    assert f"{filled}: {total / 1000:.1f} kB in all" in out and "free on the disk" in out
    assert max(len(line) for line in out.splitlines() if str(filled) not in line) <= 80


def test_clear_deletes_what_was_asked_for_and_says_what_it_freed(filled: Path, encoder: BiEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clear", "--cache", str(filled), "--older-than", "30"]) == 0
    assert "in 1 file deleted" in capsys.readouterr().out and len(shards(filled)) == 2
    assert main(["clear", "--cache", str(filled), "--model", "oth"]) == 0
    assert len(shards(filled)) == 1 and not (filled / "vectors" / "other").exists()
    assert len(VectorCache(encoder.key(), filled)) > 0
    assert main(["clear", "--cache", str(filled)]) == 0 and not shards(filled)
    capsys.readouterr()
    assert main(["clear", "--cache", str(filled)]) == 0 and "nothing to delete" in capsys.readouterr().out


def test_info_lists_and_clear_deletes_all_that_evaluations_here_and_on_a_cluster_make(
    beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert evaluation(["--dataset", str(beir()), "--methods", "fast", "--cold-queries", "1", "--cache", str(cache), "--out", str(tmp_path / "out")]) == 0
    texts = Corpus(Store(cache))
    texts["d1"] = "a text"
    assert texts.texts.parts and [path.parent.name for path in (cache / "timings").iterdir()] == ["timings"]
    Store(cache).child(PLANS).write("plan", b"which texts")
    capsys.readouterr()
    assert main(["info", "--cache", str(cache)]) == 0
    out = capsys.readouterr().out
    total = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.name != "about.json")
    assert all(f"{name}  " in out for name in BESIDE) and f"{cache}: {total / 1000:.1f} kB in all" in out
    assert main(["clear", "--cache", str(cache), "--model", next((cache / "vectors").iterdir()).name]) == 0
    assert {path.parent.name for path in cache.rglob("*") if path.is_file()} == set(BESIDE), "the model's alone"
    assert main(["clear", "--cache", str(cache)]) == 0 and not [path for path in cache.rglob("*") if path.is_file()]


def test_clear_spares_what_is_not_the_caches_or_is_being_written(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = filled / "vectors" / "other"
    spared = {place / "notes.txt", place / f"{'a' * 32}.tmp", place / "weights.safetensors", place / "mine.tmp"}
    for path in (*spared, place / f"{'b' * 32}.tmp"):
        path.write_text("x")
    for name in ("mine", "b" * 32):
        os.utime(place / f"{name}.tmp", (time.time() - 2 * 86400,) * 2)
    assert main(["clear", "--cache", str(filled)]) == 0 and "in 4 files deleted" in capsys.readouterr().out
    assert set(place.iterdir()) == spared


def test_an_empty_or_missing_folder_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--cache", str(tmp_path / "none")]) == 0
    assert "0 B in all" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_wrong_input_is_2(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clear", "--cache", str(filled), "--model", "nonsense"]) == 2 and "no such key" in capsys.readouterr().err
    file = filled / "file"
    file.write_text("")
    assert main(["info", "--cache", str(file)]) == 2 and "a file, not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["clear", "--older-than", "-1"])
    assert stop.value.code == 2 and len(shards(filled)) == 3


def test_what_cannot_be_deleted_is_1_and_named(filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["clear", "--cache", str(filled)]) == 1
    assert "Permission denied" in capsys.readouterr().err and len(shards(filled)) == 3
