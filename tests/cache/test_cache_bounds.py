"""What the vector cache drops, in memory and on disk, while other processes use the same folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rerank_lab.cache import shards as files
from rerank_lab.cache import vectors as cache_module
from rerank_lab.cache.vectors import VectorCache, ensure, text_key
from rerank_lab.models.base import Detail, Vectors
from rerank_lab.models.bi_encoder import BiEncoder
from tests.cache.test_cache import assert_same, encoded, get, made, shards
from tests.conftest import ROOT

__all__ = ["encoded"]


def test_trim_drops_what_was_not_used_for_longest_and_no_more(encoder: BiEncoder, encoded: list[str]) -> None:
    size = 4 * 384 + 2 * 3 * encoder.token_dimensions  # of a text with three tokens
    texts = [f"{word} two tables" for word in ("join", "sort", "read", "write")]
    cache = VectorCache(encoder.key(), memory_bytes=2 * size)
    for text in texts:
        get(encoder, cache, [text])
    wanted = get(encoder, cache, texts)
    assert len(cache) == 4
    cache.trim()
    assert [cache.has(text_key(text, encoder.limit), Detail.TOKENS) for text in texts] == [False, False, True, True] and len(cache) == 2
    assert_same(get(encoder, cache, texts), wanted)
    assert encoded == [*texts, *texts[:2]]
    get(encoder, cache, texts[2:3])
    cache.trim()
    assert cache.has(text_key(texts[2], encoder.limit), Detail.TOKENS), "used last, though among the oldest"


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_another_ranking_borrowed_counts_as_used(tmp_path: Path, on_disk: bool) -> None:
    all_keys = []
    shared = VectorCache("m", tmp_path if on_disk else None)
    for seed in range(3):
        keys, vectors = made(seed)
        shared.add(keys, vectors, Detail.TOKENS)
        all_keys.append(keys)
    for n, path in enumerate(sorted(shards(tmp_path), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, (1000 + n,) * 2)
    own = VectorCache("")
    assert own.borrow(shared, all_keys[0], Detail.TOKENS) == []
    own.gather(all_keys[0], Detail.TOKENS)
    shared.memory_bytes = shared.disk_bytes = 1200 if on_disk else 300
    shared.trim()
    assert [shared.has(keys[0], Detail.TOKENS) for keys in all_keys] == [True, False, False]
    assert len(own.gather(all_keys[0], Detail.TOKENS).pooled) == 3


def test_use_is_remembered_by_the_file_for_other_processes(tmp_path: Path) -> None:
    ((first, a), (second, b)) = made(0), made(1)
    for keys, vectors in ((first, a), (second, b)):
        VectorCache("m", tmp_path).add(keys, vectors, Detail.TOKENS)
    for n, path in enumerate(sorted(shards(tmp_path), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, (1000 + n,) * 2)
    VectorCache("m", tmp_path).gather(first, Detail.TOKENS)
    VectorCache("m", tmp_path, disk_bytes=1200).trim()
    left = VectorCache("m", tmp_path)
    assert left.has(first[0], Detail.TOKENS) and not left.has(second[0], Detail.TOKENS)


def test_the_bound_counts_what_other_processes_wrote(tmp_path: Path) -> None:
    mine = VectorCache("m", tmp_path, disk_bytes=4000)
    for seed in range(8):
        VectorCache("m", tmp_path).add(*made(seed), Detail.TOKENS)  # as another process would
    mine.add(*made(9), Detail.TOKENS)
    mine.trim()
    assert sum(path.stat().st_size for path in shards(tmp_path)) <= 4000
    assert mine.has(made(9)[0][0], Detail.TOKENS)


def test_what_others_have_dropped_is_let_go_of(tmp_path: Path) -> None:
    """Otherwise a mapped file takes disk space although no folder lists it."""
    (keys, vectors), mine = made(0), VectorCache("m", tmp_path)
    mine.add(keys, vectors, Detail.TOKENS)
    mine.gather(keys, Detail.TOKENS)
    for path in shards(tmp_path):
        path.unlink()
    assert len(mine.gather(keys, Detail.TOKENS).pooled) == len(keys), "still mapped"
    mine.add(*made(1), Detail.TOKENS)
    mine.trim()
    assert not mine.has(keys[0], Detail.TOKENS) and mine.has(made(1)[0][0], Detail.TOKENS)


def test_processes_that_write_read_and_trim_at_once_harm_nobody(tmp_path: Path) -> None:
    code = """
import sys
import torch
from pathlib import Path
from rerank_lab.models.base import Detail
from rerank_lab.cache.vectors import VectorCache
from tests.cache.test_cache import made
folder, own = Path(sys.argv[1]), int(sys.argv[2])
for turn in range(25):
    cache = VectorCache("m", folder, disk_bytes=20_000)
    for seed in (own * 100 + turn, turn):
        keys, vectors = made(seed)
        if not all([cache.has(key, Detail.TOKENS) for key in keys]):
            cache.add(keys, vectors, Detail.TOKENS)
        assert torch.equal(cache.gather(keys, Detail.TOKENS).tokens, vectors.tokens)
        cache.trim()
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for n in range(1, 4)
    ]  # fmt: skip
    for process in running:
        said = process.communicate()[1]
        assert process.returncode == 0 and "does not read back" not in said and "cannot be written" not in said, said
    assert 0 < sum(path.stat().st_size for path in shards(tmp_path)) <= 20_000
    for path in shards(tmp_path):
        assert files.read(path) is not None


def test_trim_keeps_what_a_later_shard_took_over_and_what_is_on_disk(tmp_path: Path) -> None:
    keys, vectors = made(0)
    cache = VectorCache("m", memory_bytes=vectors.pooled.nbytes + vectors.tokens.nbytes + vectors.states.nbytes)
    for detail in (Detail.POOLED, Detail.TOKENS):
        cache.add(keys, vectors, detail)
    cache.trim()
    assert len(cache) == 3 and torch.equal(cache.gather(keys, Detail.TOKENS).tokens, vectors.tokens)
    disk = VectorCache("m", tmp_path, memory_bytes=0)
    disk.add(keys, vectors, Detail.TOKENS)
    disk.folder = None  # as after a full disk
    disk.add(*made(1), Detail.TOKENS)
    disk.trim()
    assert len(disk) == 3 and all(disk.has(key, Detail.TOKENS) for key in keys)


def test_the_folder_is_kept_to_its_bound_by_dropping_files(encoder: BiEncoder, encoded: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"{word} two tables" for word in ("join", "sort", "read", "write")]
    size = 4 * 384 + 2 * 3 * (encoder.token_dimensions + 6 * 384)  # of a text with three tokens
    cache = VectorCache(encoder.key(), tmp_path, disk_bytes=2 * size + 2000)  # with their heads
    for text in texts[:3]:
        get(encoder, cache, [text], detail=Detail.STATES)
    assert len(cache) == len(shards(tmp_path)) == 3 and not caplog.records, "not while something may be about to be gathered"
    cache.trim()
    assert len(cache) == len(shards(tmp_path)) == 2 and len(caplog.records) == 1 and "not used for longest" in caplog.text and "--cache-gb" in caplog.text
    ensure(encoder, cache, texts, max_tokens=256, detail=Detail.STATES, keep=False)
    assert encoded == [*texts[:3], texts[0], texts[3]] and len(shards(tmp_path)) <= 2
    again = VectorCache(encoder.key(), tmp_path, disk_bytes=0)
    shards(tmp_path)[0].unlink()  # by another process
    again.trim()
    assert len(again) == len(shards(tmp_path)) == 0


def test_files_that_are_mapped_are_bounded_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAPS", 4)
    for seed in range(10):
        VectorCache("m", tmp_path).add(*made(seed), Detail.TOKENS)
    cache, read, checked = VectorCache("m", tmp_path), files.read, list[tuple[str, bool]]()

    def watched(path: Path, check: bool = True) -> Vectors | None:
        checked.append((path.name, check))
        return read(path, check)

    monkeypatch.setattr(files, "read", watched)

    def mapped() -> int:
        return sum(shard.vectors is not None for shard in cache._shards.values())

    for seed in [*range(10), 0, 9]:
        keys, vectors = made(seed)
        assert all(cache.has(key, Detail.TOKENS) for key in keys)
        assert torch.equal(cache.gather(keys, Detail.TOKENS).pooled, vectors.pooled)
        cache.trim()
        assert mapped() <= 4
    assert len(cache) == sum(len(made(seed)[0]) for seed in range(10)), "what is not mapped is not forgotten"
    assert sum(check for _, check in checked) == len({name for name, _ in checked}) == 10 and (checked[-1][1], len(checked)) == (False, 11)


def test_the_folder_is_looked_at_when_enough_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, real = list[Path](), files.shards

    def look(folder: Path) -> list[tuple[tuple[int, str, int], Path]]:
        looks.append(folder)
        return real(folder)

    monkeypatch.setattr(files, "shards", look)
    cache = VectorCache("m", tmp_path, disk_bytes=10**6)
    for seed in range(20):
        cache.add(*made(seed), Detail.TOKENS)
        cache.trim()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 1 <= len(looks) - 1 <= 2 + size / 10**4 < 20
