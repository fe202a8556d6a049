"""A folder that machines share: a path, or a URL with a local copy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rerank_lab.cache import shards as files
from rerank_lab.cache.store import MIRROR, Store, is_url
from rerank_lab.cache.vectors import VectorCache, ensure
from rerank_lab.errors import UserError
from rerank_lab.models.base import Detail
from rerank_lab.models.bi_encoder import BiEncoder
from tests.conftest import DOCUMENTS
from tests.eval.on_a_cluster import ftp_server

TEXTS = [text for _, text in DOCUMENTS.values()]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server whose files are in tmp_path/there."""
    monkeypatch.setenv(MIRROR, str(tmp_path / "here"))
    with ftp_server(tmp_path / "there") as found:
        yield f"{found}/cache"


def test_what_is_written_to_a_url_is_there_whole_and_read_from_another_machine(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url).child("a")
    assert store.remote and store.names() == {}
    store.write("x.bin", b"0123456789")
    assert (tmp_path / "there" / "cache" / "a" / "x.bin").read_bytes() == b"0123456789"
    assert not list((tmp_path / "there").rglob("*.tmp")) and not list((tmp_path / "here").rglob("*.tmp"))
    monkeypatch.setenv(MIRROR, str(tmp_path / "another machine"))
    other = Store(url).child("a")
    assert other.names() == {"x.bin": 10} and other.head("x.bin", 3, 4) == b"456" and not other.folder.exists()
    assert other.fetch("x.bin").read_bytes() == b"0123456789" and other.head("x.bin", 3, 4) == b"456"
    other.remove("x.bin")
    assert other.names() == {} and not (other.folder / "x.bin").exists()
    other.remove("x.bin")
    with pytest.raises(OSError):
        other.fetch("never there")


def test_paths_and_file_urls_are_folders(tmp_path: Path) -> None:
    for place in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        store = Store(place).child("a")
        assert not store.remote and store.folder == tmp_path / "a" and not is_url(place)
        store.write("x", b"y")
        assert store.fetch("x") == tmp_path / "a" / "x" and store.names() == {"x": 1}
        store.remove("x")


@pytest.mark.parametrize("place", ["nosuch://bucket/x", "s3://bucket/x"])
def test_a_url_that_fsspec_cannot_open(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"://bucket/x: fsspec cannot open it: "):
        Store(place)


def test_vectors_at_a_url_serve_another_machine_and_are_fetched_when_they_are_wanted(
    url: str, encoder: BiEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = VectorCache(encoder.key(), url)
    keys = ensure(encoder, first, TEXTS[:3], max_tokens=16, detail=Detail.TOKENS)
    keys += ensure(encoder, first, TEXTS[3:], max_tokens=16, detail=Detail.TOKENS)
    wanted = first.gather(keys, Detail.TOKENS)
    monkeypatch.setenv(MIRROR, str(tmp_path / "another machine"))
    monkeypatch.setattr(BiEncoder, "encode_tokens", None)  # nothing is encoded again
    other = VectorCache(encoder.key(), url)

    def copies() -> int:
        return len(list((tmp_path / "another machine").rglob("*.safetensors")))

    assert len(other) == len(TEXTS) and copies() == 0, "keys alone are read"
    assert other.has(keys[0], Detail.TOKENS) and copies() == 1, "what holds it, and no more"
    ensure(encoder, other, TEXTS, max_tokens=16, detail=Detail.TOKENS)
    found = other.gather(keys, Detail.TOKENS)
    assert copies() == 2 and all((getattr(found, n) == getattr(wanted, n)).all() for n in ("pooled", "tokens", "offsets", "lengths"))


def test_copies_are_kept_to_the_bound_and_the_files_stay(url: str, encoder: BiEncoder, tmp_path: Path) -> None:
    cache = VectorCache(encoder.key(), url, disk_bytes=0)
    keys = ensure(encoder, cache, TEXTS, max_tokens=16, detail=Detail.TOKENS)
    wanted = cache.gather(keys, Detail.TOKENS).pooled.clone()
    cache.trim()
    assert not list((tmp_path / "here").rglob("*.safetensors")) and len(list((tmp_path / "there").rglob("*.safetensors"))) == 1
    assert cache.has(keys[0], Detail.TOKENS) and (cache.gather(keys, Detail.TOKENS).pooled == wanted).all(), "fetched again"


def test_another_process_sees_what_was_added_when_it_looks_again(url: str, encoder: BiEncoder, tmp_path: Path) -> None:
    for place in (url, str(tmp_path / "folder")):
        early, late = VectorCache(encoder.key(), place), VectorCache(encoder.key(), place)
        (key,) = ensure(encoder, late, TEXTS[:1], max_tokens=16, detail=Detail.TOKENS)
        assert not early.has(key, Detail.TOKENS)
        early.refresh()
        assert early.has(key, Detail.TOKENS) and len(early) == 1


@pytest.mark.parametrize("damage", ["cut in the keys", "cut in the vectors", "another schema"])
def test_a_damaged_file_elsewhere_costs_an_encoding_and_no_more(
    url: str, encoder: BiEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    (key,) = ensure(encoder, VectorCache(encoder.key(), url), TEXTS[:1], max_tokens=16, detail=Detail.TOKENS)
    (path,) = (tmp_path / "there").rglob("*.safetensors")
    data = path.read_bytes()
    if damage == "another schema":
        path.write_bytes(data.replace(b'"schema":"%s"' % files.SHARD_SCHEMA.encode(), b'"schema":"0"'))
    else:
        path.write_bytes(data[:100] if damage == "cut in the keys" else data[:-10])
    monkeypatch.setenv(MIRROR, str(tmp_path / "another machine"))
    other = VectorCache(encoder.key(), url)
    assert not other.has(key, Detail.TOKENS) and "does not read back" in caplog.text
    assert ensure(encoder, other, TEXTS[:1], max_tokens=16, detail=Detail.TOKENS) == [key] and other.has(key, Detail.TOKENS)
