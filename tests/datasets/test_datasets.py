"""Collections on disk: what is read, what is counted, and what is refused with file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import re
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.beir import BUNDLED, bundled_names
from rerank_lab.errors import UserError
from tests.conftest import DOCUMENTS, QRELS, QUERIES

Beir = Callable[..., Path]
HEAD = "query-id\tcorpus-id\tscore\n"


def zipped(folder: Path, top: str = "", name: str = "packed.zip", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.parent / name
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, top + file.relative_to(folder).as_posix())
    return path


def test_a_folder_is_read_with_titles_joined_and_in_file_order(beir: Beir) -> None:
    data = load_dataset(str(beir()))
    assert (data.name, data.split) == ("small", "test")
    assert list(data.corpus.items()) == [(i, f"{title} {text}" if title else text) for i, (title, text) in DOCUMENTS.items()]
    assert list(data.queries.items()) == list(QUERIES.items())
    assert data.qrels == QRELS
    assert data.notes == []
    assert (data.facts["documents"], data.facts["queries"], data.facts["judgements"]) == (6, 4, 6)


@pytest.mark.parametrize("top", ["", "scifact/", "a/b/"])
def test_a_zip_is_the_folder(beir: Beir, top: str) -> None:
    folder = beir()
    packed, plain = load_dataset(str(zipped(folder, top))), load_dataset(str(folder))
    assert (packed.corpus, packed.queries, packed.qrels, packed.hash) == (plain.corpus, plain.queries, plain.qrels, plain.hash)
    assert packed.name == "packed"


def test_bundled_names_load_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "numpydoc" in bundled_names()
    data = load_dataset("numpydoc")
    first = json.loads((BUNDLED / "numpydoc" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert data.name == "numpydoc" and data.corpus[first["_id"]] == f"{first['title']} {first['text']}".strip()
    assert set(data.queries) == set(data.qrels)


def test_a_split_is_its_own_queries_and_a_missing_one_names_those_there(beir: Beir) -> None:
    beir(split="train", qrels={"q1": {"d4": 1}})
    folder = str(beir())
    train = load_dataset(folder, "train")
    assert (train.split, train.queries, train.qrels) == ("train", {"q1": QUERIES["q1"]}, {"q1": {"d4": 1}})
    with pytest.raises(UserError, match=r"no split 'dev'; it has test, train$"):
        load_dataset(folder, "dev")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"_id": "x", "text": ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["x", "text"]', "not a JSON object"),
        (b'{"text": "t"}', "no _id"),
        (b'{"_id": "", "text": "t"}', "no _id"),
        (b'{"_id": " ", "text": "t"}', "no _id"),
        (b'{"_id": null, "text": "t"}', "no _id"),
        (b'{"_id": 1.5, "text": "t"}', "no _id"),
        (b'{"_id": true, "text": "t"}', "no _id"),
        (b'{"_id": "a b", "text": "t"}', "white space"),
        (b'{"_id": "x"}', "text .* is missing"),
        (b'{"_id": "x", "text": null}', "text .* is missing"),
        (b'{"_id": "x", "text": ["t"]}', "must be strings"),
        (b'{"_id": "x", "title": 3, "text": "t"}', "must be strings"),
        (b'{"_id": "x", "text": "\\ud800"}', "surrogate"),
        (b'{"_id": "x", "text": "\xff"}', "not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_record_is_refused_with_file_and_line(beir: Beir, bad: bytes, message: str, name: str, packed: bool) -> None:
    folder = beir()
    lines = (folder / name).read_bytes().splitlines(keepends=True)
    (folder / name).write_bytes(b"".join([*lines[:2], b"\n", bad, b"\n", *lines[2:]]))  # the blank line counts
    with pytest.raises(UserError, match=rf"{name}:4: .*{message}"):
        load_dataset(str(zipped(folder) if packed else folder))


@pytest.mark.parametrize(("name", "kind", "number"), [("corpus.jsonl", "document", 7), ("queries.jsonl", "query", 5)])
@pytest.mark.parametrize("identifier", ['"x7"', "7"])
def test_a_repeated_id_is_refused(beir: Beir, name: str, kind: str, number: int, identifier: str) -> None:
    folder = beir()
    with (folder / name).open("a") as file:
        file.write(f'{{"_id": {identifier}, "text": "one"}}\n{{"_id": {identifier}, "text": "two"}}\n')
    with pytest.raises(UserError, match=rf"{name}:{number + 1}: {kind} id '.*7' stands here a second time"):
        load_dataset(str(folder))


@pytest.mark.parametrize(
    "bad", ["q1\td4", "q1 d4 1", "q1\td4\tone", "q1\td4\t0.5", "q1\td4\t+-1", "q1\td4\t" + "9" * 5000, "\td4\t1", "q1\t\t1", "q1\tx\td4\t1\ty"]
)
def test_a_malformed_judgement_is_refused_with_file_and_line(beir: Beir, bad: str) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text(f"{HEAD}q1\td1\t2\n{bad}\n")
    with pytest.raises(UserError, match=r"test\.tsv:3: needs query-id, corpus-id and a whole-number score"):
        load_dataset(str(folder))


def test_repeated_judgements_must_agree(beir: Beir) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text(f"{HEAD}q1\td1\t2\nq1\td1\t2\n")
    assert load_dataset(str(folder)).qrels == {"q1": {"d1": 2}}
    (folder / "qrels" / "test.tsv").write_text(f"{HEAD}q1\td1\t2\nq1\td1\t1\n")
    with pytest.raises(UserError, match=r"test\.tsv:3: query q1 and document d1 are judged twice, 2 and 1"):
        load_dataset(str(folder))


@pytest.mark.parametrize("text", ["q1\td1\t1\nq2\td3\t-1\n", "q1\t0\td1\t1\nq2\tQ0\td3\t-1\n", f"{HEAD}q1\td1\t1\n\nq2\td3\t-1"])
def test_judgements_with_or_without_header_and_trec_column(beir: Beir, text: str) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text(text)
    assert load_dataset(str(folder)).qrels == {"q1": {"d1": 1}, "q2": {"d3": -1}}


def test_crlf_and_a_byte_order_mark_change_nothing(beir: Beir) -> None:
    folder = beir()
    plain = load_dataset(str(folder))
    qrels = folder / "qrels" / "test.tsv"
    qrels.write_bytes(qrels.read_bytes().removeprefix(HEAD.encode()))  # otherwise the mark would only change the header
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_dataset(str(folder)).hash == plain.hash


def test_integer_ids_are_strings(beir: Beir) -> None:
    folder = beir(qrels={"1": {"2": 1}})
    (folder / "corpus.jsonl").write_text('{"_id": 2, "text": "two"}\n')
    (folder / "queries.jsonl").write_text('{"id": 1, "text": "one"}\n')
    data = load_dataset(str(folder))
    assert (data.corpus, data.queries, data.notes) == ({"2": "two"}, {"1": "one"}, [])


def test_what_is_no_collection_is_refused(beir: Beir, tmp_path: Path) -> None:
    folder, text = beir(), tmp_path / "notes.txt"
    text.write_text("no zip")
    with pytest.raises(UserError, match=r"'/no/such' is no folder, no \.zip and not bundled \(numpydoc"):
        load_dataset("/no/such")
    with pytest.raises(UserError, match=r"notes\.txt: a file, but no zip archive"):
        load_dataset(str(text))
    with pytest.raises(UserError, match=r"needs exactly one corpus\.jsonl inside, found 0"):
        load_dataset(str(zipped(folder / "qrels")))
    for copy in ("in", "out"):
        shutil.copytree(folder, tmp_path / "two" / copy)
    with pytest.raises(UserError, match="found 2"):
        load_dataset(str(zipped(tmp_path / "two")))
    with pytest.raises(UserError, match="is missing"):
        (folder / "queries.jsonl").rename(folder / "q.jsonl")
        load_dataset(str(zipped(folder)))
    with pytest.raises(UserError, match=r"not in BEIR's layout, queries\.jsonl missing"):
        load_dataset(str(folder))


def test_nothing_to_evaluate_is_refused(beir: Beir) -> None:
    with pytest.raises(UserError, match="the corpus is empty"):
        load_dataset(str(beir("a", documents={})))
    with pytest.raises(UserError, match="no query of split 'test' has both a text and a judgement"):
        load_dataset(str(beir("b", qrels={"other": {"d1": 1}})))
    folder = beir("c")
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.raises(UserError, match="it has no judgements at all"):
        load_dataset(str(folder))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_refused_or_reads_the_same_and_never_breaks(beir: Beir, compression: int) -> None:
    folder = beir(documents={f"d{i}": ("", f"text {i * 7919} of many") for i in range(300)})
    path = zipped(folder, compression=compression)
    whole, data = load_dataset(str(path)), path.read_bytes()
    refused = 0
    for place in [*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 60, len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            read = load_dataset(str(path))
            assert (read.corpus, read.queries, read.qrels) == (whole.corpus, whole.queries, whole.qrels), place
        except UserError:
            refused += 1
    assert refused > 150
    for size in (0, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="no zip archive"):
            load_dataset(str(path))


def test_unknown_documents_are_counted_and_stay_judged(beir: Beir) -> None:
    data = load_dataset(str(beir(qrels=QRELS | {"q1": {"d1": 2, "gone": 1, "lost": 0}})))
    assert data.facts["unknown_judged_documents"] == 2
    assert [n for n in data.notes if "2 judgements name documents that the corpus lacks (q1/gone, q1/lost …)" in n]
    assert data.qrels["q1"] == {"d1": 2, "gone": 1, "lost": 0}


def test_judged_queries_without_text_stay_judged_and_are_noted(beir: Beir) -> None:
    data = load_dataset(str(beir(queries=QUERIES | {"q4": "  "}, qrels=QRELS | {"q9": {"d1": 1}})))
    assert "q9" not in data.queries and set(data.qrels) == {"q1", "q2", "q3", "q4", "q9"}
    assert data.facts["judged_queries_without_text"] == 1
    assert [n for n in data.notes if n.startswith("1 judged queries have no text (q9 …)")]
    assert [n for n in data.notes if n.startswith("1 judged queries are blank (q4 …)")]


def test_overlap_with_the_other_split_is_counted(beir: Beir) -> None:
    queries = QUERIES | {"t1": QUERIES["q1"], "t2": "a query of its own"}
    beir(split="train", queries=queries, qrels={"t1": {"d1": 1, "d5": 1, "d2": 1}, "t2": {"d3": 0, "d6": 1}})
    data = load_dataset(str(beir(queries=queries)))
    # Relevant in test: d1, d2, d3, d5. d3 is judged in train, but not relevant.
    assert data.facts["overlap"] == {"train": {"relevant_documents": 3, "query_texts": 1}}
    assert [n for n in data.notes if n.startswith("3 of 4 documents relevant in test are relevant in train too, and 1 query texts stand in both")]


def test_ids_of_both_kinds_are_counted(beir: Beir) -> None:
    assert load_dataset(str(beir(queries=QUERIES | {"d1": "same"}, qrels=QRELS | {"d1": {"d2": 1}}))).facts["ids_both_query_and_document"] == 1


def test_the_hash_is_of_the_content(beir: Beir) -> None:
    def digest(name: str, **parts: object) -> str:
        return load_dataset(str(beir(name, **parts))).hash

    plain = digest("a")
    assert digest("b") == plain
    changed = [
        digest("c", documents=DOCUMENTS | {"d6": ("", "other")}),
        digest("d", queries=QUERIES | {"q4": "other"}),
        digest("e", qrels=QRELS | {"q4": {"d2": 2}}),
        digest("f", documents=dict(reversed(DOCUMENTS.items()))),
        digest("g", documents=DOCUMENTS | {"d7": ("", "")}),
    ]
    assert len({plain, *changed}) == 6


def test_a_corpus_streams_and_is_held_once(beir: Beir) -> None:
    folder, size = beir(), 0
    words = "the text of a document of some length that goes on for a while " * 60
    with (folder / "corpus.jsonl").open("a") as file:
        for i in range(5000):
            text = f"{i} {words}"
            size += len(text)
            file.write(json.dumps({"_id": f"x{i}", "text": text}) + "\n")
    assert size > 18_000_000
    tracemalloc.start()
    try:
        data = load_dataset(str(folder))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data.corpus) == 5006
    assert peak < 1.2 * size


def test_a_first_judgement_is_not_taken_for_a_header(beir: Callable[..., Path]) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text("q1\td1\t1\nq2\td3\t1\n")
    assert load_dataset(str(folder)).qrels == {"q1": {"d1": 1}, "q2": {"d3": 1}}
    (folder / "qrels" / "test.tsv").write_text("q1\td1\t1.5\nq2\td3\t1\n")
    with pytest.raises(UserError, match=r"test.tsv:1: "):
        load_dataset(str(folder))


@pytest.mark.parametrize("bad", ["a\u0000b", "a\u0007b", "a b"])
def test_ids_that_would_break_a_trec_file_are_refused(beir: Callable[..., Path], bad: str) -> None:
    for parts in ({"documents": {bad: ("", "text")}}, {"queries": {bad: "text"}}, {"qrels": {"q1": {bad: 1}}}):
        with pytest.raises(UserError, match="white space or control"):
            load_dataset(str(beir(**parts)))


def test_hidden_files_are_nobodys_split_and_never_the_corpus(beir: Beir) -> None:
    folder = beir()
    plain = load_dataset(str(folder))
    double = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\x00\xff"  # macOS writes such a file beside each file on a foreign file system
    for name in ("._corpus.jsonl", "._queries.jsonl", "qrels/._test.tsv", "qrels/.~lock.test.tsv", "__MACOSX/._corpus.jsonl", "__MACOSX/qrels/._test.tsv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(double)
    copies = {".ipynb_checkpoints/corpus.jsonl": "corpus.jsonl", "qrels/.ipynb_checkpoints/test-checkpoint.tsv": "qrels/test.tsv"}
    for copy, name in copies.items():
        (folder / copy).parent.mkdir()
        shutil.copy(folder / name, folder / copy)
    packed = zipped(folder, "small/")
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("__MACOSX/small/corpus.jsonl", double)
        archive.writestr("__MACOSX/small/qrels/train.tsv", double)
    for spec in (folder, packed):
        data = load_dataset(str(spec))
        assert (data.hash, data.notes, data.facts) == (plain.hash, [], plain.facts), "no split, no second corpus, no contamination"
        with pytest.raises(UserError, match=r"no split 'dev'; it has test$"):
            load_dataset(str(spec), "dev")


@pytest.mark.parametrize("packed", [False, True])
def test_another_splits_fault_is_a_note(beir: Beir, packed: bool) -> None:
    folder = beir()
    plain = load_dataset(str(folder))
    beir(split="dev", qrels={"q1": {"d1": 1}})
    (folder / "qrels" / "train.tsv").write_text(f"{HEAD}q1\td1\t1\nq2\td3\n")
    (folder / "qrels" / "valid.tsv").write_text("q1\td1\t999999999\n")
    spec = str(zipped(folder) if packed else folder)
    data = load_dataset(spec)
    assert data.hash == plain.hash and list(data.facts["overlap"]) == ["dev"]  # type: ignore[arg-type]
    assert len(data.notes) == 3
    assert [n for n in data.notes if re.match(r"split train cannot be compared with test: .*train\.tsv:3: needs query-id", n)]
    assert [n for n in data.notes if re.match(r"split valid cannot be compared with test: .*valid\.tsv:1: the score '999999999' is too large", n)]
    with pytest.raises(UserError, match=r"train\.tsv:3: needs query-id"):
        load_dataset(spec, "train")


def test_quotes_in_judgements_are_csvs(beir: Beir) -> None:
    folder = beir(documents=DOCUMENTS | {'5"-pipe': ("", "text"), 'say"so': ("", "text")})
    (folder / "qrels" / "test.tsv").write_text('"query-id"\t"corpus-id"\t"score"\n"q1"\t"d1"\t"2"\nq2\t5"-pipe\t1\nq2\t"say""so"\t1\n')
    data = load_dataset(str(folder))
    assert data.qrels == {"q1": {"d1": 2}, "q2": {'5"-pipe': 1, 'say"so': 1}} and data.notes == []
    # BEIR's own loader reads quotes like this.
    with (folder / "qrels" / "test.tsv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_MINIMAL))[1:]
    assert [(q, d, g) for q, judged in data.qrels.items() for d, g in judged.items()] == [(q, d, int(g)) for q, d, g in rows]
    for bad in ('"q1\td1\t1', '"q1"x\td1\t1', '"q1\td1"\t1'):
        (folder / "qrels" / "test.tsv").write_text(f"{HEAD}{bad}\nq2\td3\t1\n")
        with pytest.raises(UserError, match=r"test\.tsv:2: needs query-id"):
            load_dataset(str(folder))


@pytest.mark.parametrize(("written", "grade"), [("1.0", 1), ("2.", 2), ("+1", 1), ("-1.0", -1), ("1.000000000000000000e+00", 1), ("1E1", 10), (" 3 ", 3)])
def test_a_whole_number_is_a_grade_however_it_is_written(beir: Beir, written: str, grade: int) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text(f"q1\td1\t{written}\nq2\td3\t1\n")
    assert load_dataset(str(folder)).qrels == {"q1": {"d1": grade}, "q2": {"d3": 1}}


@pytest.mark.parametrize("bad", ["1.5", "1e-1", "nan", "inf", "1e999", "0x1", "1_0", ".", "1,0", "", "TRUE"])
def test_what_is_no_whole_number_is_refused_with_its_line(beir: Beir, bad: str) -> None:
    folder = beir()
    (folder / "qrels" / "test.tsv").write_text(f"{HEAD}q1\td1\t1\nq2\td3\t{bad}\n")
    with pytest.raises(UserError, match=r"test\.tsv:3: needs query-id, corpus-id and a whole-number score"):
        load_dataset(str(folder))


def gzipped(path: Path, name: str | None = None) -> Path:
    """Compresses the file, under its name with .gz or another suffix."""
    packed = path.with_name(name or f"{path.name}.gz")
    content = gzip.compress(path.read_bytes(), mtime=0)
    path.unlink()
    packed.write_bytes(content)
    return packed


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by its first bytes"])
@pytest.mark.parametrize("archived", [False, True])
def test_gzip_is_taken_off(beir: Beir, named: bool, archived: bool) -> None:
    beir(split="train", qrels={"q1": {"d4": 1}})
    folder = beir()
    plain = load_dataset(str(folder))
    packed = [gzipped(folder / n, None if named else Path(n).name) for n in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels/train.tsv")]
    spec = str(zipped(folder, "top/") if archived else folder)
    data = load_dataset(spec)
    assert (data.hash, data.notes, data.facts) == (plain.hash, plain.notes, plain.facts) and load_dataset(spec, "train").qrels == {"q1": {"d4": 1}}
    packed[0].write_bytes(packed[0].read_bytes()[:-20])
    with pytest.raises(UserError, match=r"corpus\.jsonl(\.gz)? cannot be read: Compressed file ended before"):
        load_dataset(str(zipped(folder, "top/", name="again.zip") if archived else folder))


def test_the_plain_file_goes_before_the_packed_one_and_other_packers_are_named(beir: Beir) -> None:
    folder = beir()
    plain = load_dataset(str(folder))
    for name in ("corpus.jsonl", "qrels/test.tsv"):
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"old"))
    assert load_dataset(str(folder)).hash == plain.hash
    (folder / "corpus.jsonl").write_bytes(bz2.compress((folder / "corpus.jsonl").read_bytes()))
    with pytest.raises(UserError, match=r"corpus\.jsonl: packed with bzip2, and of such gzip alone is read"):
        load_dataset(str(folder))
