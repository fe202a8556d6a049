"""The corpus on disk: texts are read by position."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from rerank_lab.cache.store import Store
from rerank_lab.datasets import corpus as module
from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.corpus import Corpus, digests
from rerank_lab.errors import UserError
from tests.conftest import DOCUMENTS, write_beir

ODD = {"a": "", "b": "naïve 你好 \U0001f600", "c": "x" * 1000, "d": "", "e": "line\nbreak\0nul", "f": "x" * 1000}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(module, "PART", (3, 1500))
    found = Corpus(Store(tmp_path))
    for identifier, text in ODD.items():
        found[identifier] = text
    return found


def test_it_is_the_mapping_that_was_put_in(corpus: Corpus) -> None:
    assert dict(corpus) == ODD and list(corpus) == list(ODD) and len(corpus) == 6
    assert "a" in corpus and "z" not in corpus and corpus.get("z") is None
    assert corpus.texts.read(np.array([5, 0, 1])) == [ODD["f"], ODD["a"], ODD["b"]] and corpus.texts.read([]) == []
    assert corpus.positions(["f", "a"]).tolist() == [5, 0]
    assert corpus.distinct(np.array([5, 3, 0, 2, 1])).tolist() == [5, 3, 1], "the first of each text, in their order"
    assert len(set(digests(corpus))) == len(set(digests(ODD))) == 4


def test_the_reader_travels_and_finds_its_files_there(corpus: Corpus, tmp_path: Path) -> None:
    sent = pickle.dumps(corpus.texts)
    assert len(sent) < 500 and b"xxxx" not in sent
    assert pickle.loads(sent).read([2, 1]) == [ODD["c"], ODD["b"]]
    for path in (tmp_path / "texts").iterdir():
        path.unlink()
    with pytest.raises(OSError):
        pickle.loads(sent).read([0])


def test_the_same_texts_are_written_once(corpus: Corpus, tmp_path: Path) -> None:
    assert len(corpus.texts) == 6
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()}
    again = Corpus(Store(tmp_path))
    for identifier, text in ODD.items():
        again[f"other {identifier}"] = text
    assert again.texts == corpus.texts and {path.name: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()} == before


def test_a_collection_loads_into_it_as_into_memory(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "small")
    plain, stored = load_dataset(str(folder)), load_dataset(str(folder), corpus=Corpus(Store(tmp_path / "cache")))
    assert dict(stored.corpus) == dict(plain.corpus) and stored.hash == plain.hash and stored.facts == plain.facts
    with (folder / "corpus.jsonl").open("a") as file:
        file.write((folder / "corpus.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=f"corpus.jsonl:{len(DOCUMENTS) + 1}: document id 'd1' stands here a second time"):
        load_dataset(str(folder), corpus=Corpus(Store(tmp_path / "cache")))
