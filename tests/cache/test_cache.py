"""Vectors are made once and outlive the process. If a shard is damaged, only its own texts are encoded again."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rerank_lab.cache import shards as files
from rerank_lab.cache import vectors as module
from rerank_lab.cache.places import default_place
from rerank_lab.cache.vectors import VectorCache, ensure, text_key
from rerank_lab.models.base import Detail, Tokens, Vectors
from rerank_lab.models.bi_encoder import BiEncoder
from tests.conftest import DOCUMENTS, ROOT

TEXTS = [*(text for _, text in DOCUMENTS.values()), ""]


@pytest.fixture
def encoded(encoder: BiEncoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects every text that the real encoder encodes from now on."""
    seen: list[str] = []
    real = encoder.tokenize

    def tokenize(texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        seen.extend(texts)
        return real(texts, kind, max_tokens)

    monkeypatch.setattr(encoder, "tokenize", tokenize)
    return seen


def get(encoder: BiEncoder, cache: VectorCache, texts: Sequence[str] = TEXTS, detail: Detail = Detail.TOKENS, max_tokens: int = 512) -> Vectors:
    return cache.gather(ensure(encoder, cache, texts, max_tokens=max_tokens, detail=detail), detail)


def assert_same(found: Vectors, wanted: Vectors) -> None:
    torch.testing.assert_close(found.pooled, wanted.pooled, atol=1e-5, rtol=0)
    assert torch.equal(found.lengths, wanted.lengths) and torch.equal(found.offsets, wanted.offsets)
    torch.testing.assert_close(found.tokens, wanted.tokens, atol=2e-3, rtol=0)


def made(seed: int, count: int = 3) -> tuple[list[bytes], Vectors]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (count,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = [torch.randn(int(offsets[-1]), columns, generator=generator).half() for columns in (4, 6)]
    vectors = Vectors(torch.randn(count, 8, generator=generator), lengths, offsets, *packed)
    return [text_key(f"{seed}/{i}", 9) for i in range(count)], vectors


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_distinct_text_is_encoded_once(encoder: BiEncoder, encoded: list[str], tmp_path: Path, on_disk: bool) -> None:
    cache = VectorCache(encoder.key(), tmp_path if on_disk else None)
    first = get(encoder, cache, TEXTS * 2)
    assert encoded == TEXTS and len(cache) == len(TEXTS)
    again = get(encoder, cache, [TEXTS[3], *TEXTS, TEXTS[3]])
    assert encoded == TEXTS
    assert torch.equal(again.pooled[1:-1], first.pooled[: len(TEXTS)])


def test_vectors_outlive_the_cache_that_made_them(encoder: BiEncoder, encoded: list[str], tmp_path: Path) -> None:
    wanted = get(encoder, VectorCache(encoder.key(), tmp_path))
    encoded.clear()
    assert_same(get(encoder, VectorCache(encoder.key(), tmp_path)), wanted)
    assert encoded == []
    get(encoder, VectorCache("another model", tmp_path))
    assert encoded == TEXTS


def test_text_limit_and_kind_have_vectors_of_their_own(encoder: BiEncoder, encoded: list[str]) -> None:
    assert len({text_key("a", 1), text_key("a", 2), text_key("b", 1), text_key("a", 1, "query"), text_key("", 1), text_key("1\0a", 1)}) == 6
    cache = VectorCache(encoder.key())
    assert get(encoder, cache, TEXTS[:1], max_tokens=2).offsets.tolist() == [0, 2]
    assert get(encoder, cache, TEXTS[:1], max_tokens=3).offsets.tolist() == [0, 3]
    assert encoded == TEXTS[:1] * 2
    get(encoder, cache, TEXTS[:1], max_tokens=encoder.limit), get(encoder, cache, TEXTS[:1], max_tokens=512)
    assert encoded == TEXTS[:1] * 3, "past the model's own limit there is nothing to tell apart"


def test_pooled_entries_are_encoded_again_for_tokens_and_not_the_other_way(encoder: BiEncoder, encoded: list[str], tmp_path: Path) -> None:
    cache = VectorCache(encoder.key(), tmp_path)
    get(encoder, cache, detail=Detail.POOLED)
    wanted = get(encoder, cache)
    assert encoded == TEXTS * 2 and len(wanted.tokens) > 0
    get(encoder, cache, detail=Detail.POOLED)
    for turn in range(2):  # in both orders of reading the shards
        for place, path in enumerate(shards(tmp_path)):
            os.utime(path, (1000 + abs(turn - place),) * 2)
        assert_same(get(encoder, VectorCache(encoder.key(), tmp_path)), wanted)
    assert encoded == TEXTS * 2


def test_gather_keeps_the_order_asked_for_across_shards(tmp_path: Path) -> None:
    for cache in (VectorCache("m"), VectorCache("m", tmp_path)):
        texts: list[tuple[bytes, Tensor, Tensor]] = []
        for seed in range(4):
            keys, vectors = made(seed)
            cache.add(keys, vectors, Detail.TOKENS)
            tokens = torch.tensor_split(vectors.tokens, vectors.offsets[1:-1])
            texts += zip(keys, vectors.pooled, tokens)
        asked = [texts[i] for i in (11, 0, 5, 5, 7, 1, 0)]
        found = cache.gather([key for key, _, _ in asked], Detail.TOKENS)
        assert torch.equal(found.pooled, torch.stack([pooled for _, pooled, _ in asked]))
        assert torch.equal(found.tokens, torch.cat([tokens for _, _, tokens in asked])) and found.offsets[0] == 0
        assert found.lengths.tolist() == [len(tokens) for _, _, tokens in asked] == found.offsets.diff().tolist()
        assert found.lengths.min() == 0 < found.lengths.max()
        slim = cache.gather([key for key, _, _ in asked], Detail.POOLED)
        assert torch.equal(slim.pooled, found.pooled) and len(slim.tokens) == 0
        assert cache.gather([], Detail.TOKENS).offsets.tolist() == [0]


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut short": lambda p: change(p, lambda b: b[:-7]),
    "cut in the header": lambda p: change(p, lambda b: b[:40]),
    "longer": lambda p: change(p, lambda b: b + b"x"),
    "empty": lambda p: change(p, lambda b: b""),
    "flipped in the middle": lambda p: change(p, lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :]),
    "flipped at the end": lambda p: change(p, lambda b: b[:-1] + bytes([b[-1] ^ 128])),
    "another kind of shard": lambda p: change(p, lambda b: b.replace(b'"detail":"1"', b'"detail":"0"', 1)),
    "text": lambda p: change(p, lambda b: b"a file of someone else's"),
    "keys of another shape": lambda p: save_file(
        load_file(p) | {"keys": torch.zeros(16, 3, dtype=torch.uint8)}, p, {"schema": files.SHARD_SCHEMA, "detail": "1"}
    ),
    "no rows of keys": lambda p: save_file(load_file(p) | {"keys": torch.zeros((), dtype=torch.uint8)}, p, {"schema": files.SHARD_SCHEMA, "detail": "1"}),
    "another safetensors file": lambda p: save_file(load_file(p), p, {"schema": files.SHARD_SCHEMA}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_dropped_with_a_warning_and_rebuilt(
    encoder: BiEncoder, encoded: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = VectorCache(encoder.key(), tmp_path)
    get(encoder, cache, TEXTS[:2])
    (spared,) = shards(tmp_path)
    wanted = get(encoder, cache)
    (path,) = set(shards(tmp_path)) - {spared}
    DAMAGE[damage](path)
    encoded.clear()
    assert_same(get(encoder, VectorCache(encoder.key(), tmp_path)), wanted)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and str(path) in caplog.text
    assert encoded == TEXTS[2:] and spared.exists() and not path.exists()
    encoded.clear()
    assert_same(get(encoder, VectorCache(encoder.key(), tmp_path)), wanted)
    assert encoded == [] and len(caplog.records) == 1


@pytest.mark.parametrize("reader", ["safe_open", "load_file"])
@pytest.mark.parametrize("gone", [False, True])
def test_what_cannot_be_read_now_is_no_damage(
    encoder: BiEncoder, encoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reader: str, gone: bool
) -> None:
    wanted = get(encoder, VectorCache(encoder.key(), tmp_path))
    (path,) = shards(tmp_path)
    encoded.clear()
    real = getattr(files, reader)

    def fails(file: Path, *arguments: Any, **options: Any) -> Any:
        if file != path:
            return real(file, *arguments, **options)
        if gone:
            path.unlink(missing_ok=True)
        raise RuntimeError("unable to open file: too many open files (24)\nand more")

    monkeypatch.setattr(files, reader, fails)
    assert_same(get(encoder, VectorCache(encoder.key(), tmp_path)), wanted)
    assert encoded == TEXTS and path.exists() != gone
    said = [record.message for record in caplog.records]
    assert said == [] if gone else len(said) == 1 and f"{path} cannot be read (unable to open file: too many open files (24)); left alone" in said[0]


def test_no_flipped_bit_of_a_shard_goes_unseen(tmp_path: Path) -> None:
    VectorCache("m", tmp_path).add(*made(0), Detail.TOKENS)
    (path,) = shards(tmp_path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert files.read(path) is None, place


def test_opening_reads_no_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_ones = [made(seed) for seed in range(3)]
    for keys, vectors in made_ones:
        VectorCache("m", tmp_path).add(keys, vectors, Detail.TOKENS)
    read: list[Path] = []
    real = files.checksum
    monkeypatch.setattr(files, "checksum", lambda path: read.append(path) or real(path))  # type: ignore[func-returns-value]
    cache = VectorCache("m", tmp_path)
    assert len(cache) == 9 and read == []
    assert cache.has(made_ones[1][0][0], Detail.TOKENS) and cache.has(made_ones[1][0][2], Detail.TOKENS)
    assert len(read) == 1
    torch.equal(cache.gather(made_ones[1][0], Detail.TOKENS).pooled, made_ones[1][1].pooled)
    assert len(read) == 1


@pytest.mark.parametrize(("schema", "left"), [("0", 0), ("99", 1)])
def test_a_shard_of_an_older_schema_is_dropped_without_alarm_and_a_newer_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, schema: str, left: int
) -> None:
    with monkeypatch.context() as another:
        another.setattr(files, "SHARD_SCHEMA", schema)
        VectorCache("m", tmp_path).add(*made(0), Detail.TOKENS)
    assert len(VectorCache("m", tmp_path)) == 0 and len(shards(tmp_path)) == left and not caplog.records


def test_leftovers_of_a_writer_are_ignored_and_old_ones_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    VectorCache("m", tmp_path).add(*made(0), Detail.TOKENS)
    (shard,) = shards(tmp_path)
    young, old = (shard.with_name(f"{letter * 32}.tmp") for letter in "ab")
    for path in (young, old):
        path.write_bytes(shard.read_bytes()[:50])
    os.utime(old, (time.time() - 7200,) * 2)
    assert len(VectorCache("m", tmp_path)) == 3 and not caplog.records
    assert young.exists() and not old.exists()


def test_a_kill_while_writing_leaves_no_half_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from typing import Any
from rerank_lab.models.base import Detail
from rerank_lab.cache.vectors import VectorCache
from tests.cache.test_cache import made
cache = VectorCache("m", Path(sys.argv[1]))
cache.add(*made(0), Detail.TOKENS)
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
cache.add(*made(1), Detail.TOKENS)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == len(shards(tmp_path)) == 1
    cache = VectorCache("m", tmp_path)
    keys, vectors = made(0)
    assert not caplog.records and len(cache) == 3 and torch.equal(cache.gather(keys, Detail.TOKENS).pooled, vectors.pooled)


def test_what_was_encoded_before_an_interruption_stays(encoder: BiEncoder, encoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", dict.fromkeys(Detail, 3))
    calls: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        calls.append((done, total))
        if sum(d for d, _ in calls) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(encoder, VectorCache(encoder.key(), tmp_path), TEXTS, max_tokens=256, detail=Detail.TOKENS, progress=interrupt)
    assert {total for _, total in calls} == {len(TEXTS)}
    encoded.clear()
    get(encoder, VectorCache(encoder.key(), tmp_path))
    assert encoded == TEXTS[3:]


@pytest.mark.parametrize("blocked", ["cache", "cache/vectors"])
def test_a_folder_that_cannot_be_made_leaves_the_cache_in_memory(
    encoder: BiEncoder, encoded: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, blocked: str
) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file where a folder should be")
    cache = VectorCache(encoder.key(), tmp_path / "cache")
    wanted = get(encoder, cache)
    assert_same(get(encoder, cache), wanted)
    assert encoded == TEXTS and "cannot be written" in caplog.text


def test_a_full_disk_leaves_the_cache_in_memory_with_what_it_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = VectorCache("m", tmp_path)
    (first, few), (second, many) = made(0), made(1, 10_000)
    cache.add(first, few, Detail.TOKENS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        cache.add(second, many, Detail.TOKENS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in caplog.text
    assert torch.equal(cache.gather([*first, *second], Detail.TOKENS).pooled[3:], many.pooled)
    assert len(VectorCache("m", tmp_path)) == 3


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_hold_what_less_detail_asks_for(encoder: BiEncoder, encoded: list[str], tmp_path: Path, on_disk: bool) -> None:
    folder, keys = tmp_path if on_disk else None, [text_key(text, encoder.limit) for text in TEXTS]
    cache = VectorCache(encoder.key(), folder)
    wanted = get(encoder, cache)
    assert_same(get(encoder, cache, detail=Detail.STATES), wanted)
    states = cache.states(keys)
    direct = encoder.encode(TEXTS, detail=Detail.STATES)
    assert encoded == TEXTS * 3 and torch.cat(states).shape == (len(direct.tokens), 6 * 384)
    torch.testing.assert_close(torch.cat(states), direct.states, atol=2e-2, rtol=1e-2)
    if on_disk:
        cache = VectorCache(encoder.key(), folder)
    assert [part.tolist() for part in cache.states(keys)] == [part.tolist() for part in states]
    assert len(get(encoder, cache).states) == 0 == len(get(encoder, cache, detail=Detail.POOLED).tokens)
    assert encoded == TEXTS * 3


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_LAB_CACHE", "/own")
    assert default_place() == "/own"
    monkeypatch.delenv("RERANK_LAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_place() == "/xdg/rerank_lab"
