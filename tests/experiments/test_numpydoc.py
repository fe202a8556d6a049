"""The bundled collection `numpydoc`: it is complete, has no leaks, and is exactly what its script makes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "rerank_lab" / "data" / "numpydoc"
SCRIPT = ROOT / "experiments" / "collections" / "build_numpydoc.py"
PINNED = {"numpy": "2.4.6", "pandas": "3.1.1"}
pinned = pytest.mark.skipif(any(metadata.version(package) != version for package, version in PINNED.items()), reason=f"made from {PINNED}")


def rows(name: str) -> dict[str, dict[str, str]]:
    parsed = [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]
    found = {row["_id"]: row for row in parsed}
    assert len(found) == len(parsed), f"{name}: ids occur twice"
    return found


def judgements(split: str) -> dict[str, list[str]]:
    header, *lines = (DATA / "qrels" / f"{split}.tsv").read_text("utf-8").splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    found: dict[str, list[str]] = {}
    for line in lines:
        query, doc, score = line.split("\t")
        assert score == "1"
        found.setdefault(query, []).append(doc)
    return found


def said(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


CORPUS, QUERIES = rows("corpus.jsonl"), rows("queries.jsonl")
TRAIN, TEST = judgements("train"), judgements("test")


def test_counts() -> None:
    assert len(CORPUS) == 1200
    assert len(TEST) == 300
    assert 900 <= len(TRAIN) <= 1100
    libraries = Counter(doc.split(".")[0] for doc in CORPUS)
    assert set(libraries) == set(PINNED) and min(libraries.values()) > 300
    per_query = [len(docs) for docs in (TRAIN | TEST).values()]
    assert max(per_query) <= 12 and sum(per_query) / len(per_query) < 1.6
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 3_000_000


def test_the_files_fit_together() -> None:
    assert set(TRAIN) | set(TEST) == set(QUERIES)
    assert {doc for docs in (TRAIN | TEST).values() for doc in docs} <= set(CORPUS)
    assert all(len(docs) == len(set(docs)) for docs in (TRAIN | TEST).values())
    for row in CORPUS.values():
        assert set(row) == {"_id", "title", "text"} and len(said(row["text"]).split()) >= 5
    for row in QUERIES.values():
        assert set(row) == {"_id", "text"} and row["text"] == " ".join(row["text"].split()) and len(row["text"].split()) >= 4


def test_nothing_leaks_from_train_to_test() -> None:
    train, test = ({doc for docs in split.values() for doc in docs} for split in (TRAIN, TEST))
    assert not train & test
    assert not TRAIN.keys() & TEST.keys()
    texts = [Counter(QUERIES[query]["text"].lower() for query in split) for split in (TRAIN, TEST)]
    assert not texts[0].keys() & texts[1].keys()
    assert max(texts[0].values()) == max(texts[1].values()) == 1
    vocabulary = {doc: set(said(CORPUS[doc]["text"]).split()) for doc in train | test}
    for a in test:
        for b in train:
            both, either = len(vocabulary[a] & vocabulary[b]), len(vocabulary[a] | vocabulary[b])
            assert both < 0.86 * either, f"near-copies in both splits: {a}, {b}"
    for doc in test:  # DataFrame.x and Series.x are one group
        twin = doc.replace("pandas.Series.", "pandas.DataFrame.") if "Series" in doc else doc.replace("pandas.DataFrame.", "pandas.Series.")
        assert twin not in train, f"one group in both splits: {doc}, {twin}"


def test_no_query_stands_in_its_relevant_document() -> None:
    for query, docs in (TRAIN | TEST).items():
        for doc in docs:
            text = f" {said(CORPUS[doc]['title'])} {said(CORPUS[doc]['text'])} "
            assert f" {said(QUERIES[query]['text'])} " not in text, (query, doc)


def test_documents_are_clean() -> None:
    for doc, row in CORPUS.items():
        assert not re.search(r"^(See Also|References|Examples)\n-+$", row["text"], re.MULTILINE | re.IGNORECASE), doc
        assert not re.search(r"0x[0-9a-f]{6}|on this platform|/home/|/root/", row["text"]), doc


def test_queries_are_understood_alone() -> None:
    texts = [row["text"] for row in QUERIES.values()]
    assert not [text for text in texts if re.match(r"(equivalent|similar|same) (function|method)|aggregating \w+ for", text, re.IGNORECASE)]
    assert not [text for text in texts if "`" in text or ":func:" in text or ":meth:" in text]
    assert {"Complex-conjugating dot product for stacks of vectors", "Low-level writer for Stata data files"} <= set(texts)


def test_known_pairs() -> None:
    relevant = {QUERIES[query]["text"]: docs for query, docs in (TRAIN | TEST).items()}
    assert relevant["Low-level writer for Stata data files"] == ["pandas.io.stata.StataWriter"]
    assert relevant["Complex-conjugating dot product for stacks of vectors"] == ["numpy.vecdot"]
    assert relevant["Flip array in the left/right direction"] == ["numpy.fliplr"]
    assert relevant["Alter DataFrame index labels or name"] == ["pandas.DataFrame.rename", "pandas.Series.rename"]


def test_licences_and_card_stand_beside_it() -> None:
    for name, holder in (("numpy", "NumPy Developers"), ("pandas", "PyData Development Team")):
        text = (DATA / f"LICENSE-{name}.txt").read_text("utf-8")
        assert holder in text and "Redistribution and use in source and binary forms" in text and len(text) < 10_000
    card = (DATA / "README.md").read_text("utf-8")
    for count in (len(CORPUS), len(QUERIES), len(TRAIN), len(TEST), sum(map(len, TRAIN.values())), sum(map(len, TEST.values()))):
        assert re.search(rf"(?<![\d,]){count:,}(?![\d,])", card), f"README.md does not say {count:,}"
    assert all(f"{package}=={version}" in card for package, version in PINNED.items())


def check(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300, check=False)


@pinned
def test_the_script_makes_these_very_files(tmp_path: Path) -> None:
    copy = shutil.copytree(DATA, tmp_path / "numpydoc")
    # another hash seed and another folder must make no difference
    done = check("--check", "--out", copy, PYTHONHASHSEED="4321")
    assert (done.returncode, done.stderr) == (0, "")
    with (copy / "qrels" / "test.tsv").open("a", encoding="utf-8") as file:
        file.write("q\tnumpy.dot\t1\n")
    done = check("--check", "--out", copy, PYTHONHASHSEED="1")
    assert done.returncode == 1
    assert "qrels/test.tsv" in done.stderr and "corpus.jsonl" not in done.stderr


def test_the_script_refuses_other_versions(tmp_path: Path) -> None:
    other = tmp_path / "numpy-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n", "utf-8")
    done = check("--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "9.9.9" in done.stderr and "2.4.6" in done.stderr and "--any-version" in done.stderr
    assert not (tmp_path / "out").exists()
