"""Collections through `datasets` and ir_datasets, with local files only."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from rerank_lab.datasets import load_dataset
from rerank_lab.errors import UserError

DOCUMENTS = [{"_id": "d1", "title": "One", "text": "first"}, {"_id": "d2", "title": "", "text": "second"}]
QUERIES = [{"_id": "q1", "text": "which"}, {"_id": "q2", "text": "what"}]
TEST = [{"query-id": "q1", "corpus-id": "d1", "score": 2}, {"query-id": "q2", "corpus-id": "d9", "score": 1}]
DEV = [{"query-id": "q2", "corpus-id": "d2", "score": 1}]
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(folder: Path, configs: dict[str, dict[str, Rows]]) -> None:
    """A folder that `datasets` reads: configuration → split → rows."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = folder / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture
def mteb(tmp_path: Path) -> Callable[..., Path]:
    def build(documents: Rows = DOCUMENTS, queries: Rows = QUERIES, test: Rows = TEST, dev: Rows = DEV, qrels: str = "default") -> Path:
        write(tmp_path / "mteb", {"corpus": {"corpus": documents}, "queries": {"queries": queries}, qrels: {"test": test, "dev": dev}})
        return tmp_path / "mteb"

    return build


@pytest.mark.parametrize("qrels", ["default", "qrels"])
@pytest.mark.parametrize("end", ["", "/"])
def test_mteb_layout(mteb: Callable[..., Path], qrels: str, end: str) -> None:
    data = load_dataset(f"hf:{mteb(qrels=qrels)}{end}")
    assert (data.name, data.split) == ("mteb", "test")
    assert (data.corpus, data.queries) == ({"d1": "One first", "d2": "second"}, {"q1": "which", "q2": "what"})
    assert data.qrels == {"q1": {"d1": 2}, "q2": {"d9": 1}}
    assert data.facts["unknown_judged_documents"] == 1 and data.facts["overlap"] == {"dev": {"relevant_documents": 0, "query_texts": 1}}
    assert load_dataset(f"hf:{mteb(qrels=qrels)}", "dev").qrels == {"q2": {"d2": 1}}


@pytest.mark.parametrize("end", ["", "/"])
def test_beir_layout_with_judgements_in_a_sibling(tmp_path: Path, end: str) -> None:
    write(tmp_path / "beir", {"corpus": {"corpus": DOCUMENTS}, "queries": {"queries": QUERIES}})
    (tmp_path / "beir-qrels").mkdir()
    (tmp_path / "beir-qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    data = load_dataset(f"hf:{tmp_path}/beir{end}")
    assert (data.name, data.corpus, data.qrels) == ("beir", {"d1": "One first", "d2": "second"}, {"q1": {"d1": 2}})
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        load_dataset(f"hf:{tmp_path}/beir", "train")
    (tmp_path / "beir-qrels").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="beir-qrels cannot be read"):
        load_dataset(f"hf:{tmp_path}/beir")


def test_integer_ids_and_whole_floats_are_taken(mteb: Callable[..., Path]) -> None:
    rows = [{"query-id": 1, "corpus-id": 2, "score": 1.0}]
    data = load_dataset(f"hf:{mteb([{'_id': 2, 'text': 'two'}], [{'id': 1, 'text': 'one'}], rows, rows)}")
    assert (data.corpus, data.queries, data.qrels) == ({"2": "two"}, {"1": "one"}, {"1": {"2": 1}})


@pytest.mark.parametrize("score", ["1", " 1.0", "1e0"])
def test_grades_as_strings_are_taken(mteb: Callable[..., Path], score: str) -> None:
    rows = [{"query-id": "q1", "corpus-id": "d1", "score": score}]
    assert load_dataset(f"hf:{mteb(test=rows, dev=rows)}").qrels == {"q1": {"d1": 1}}


def test_another_splits_fault_is_a_note(mteb: Callable[..., Path]) -> None:
    folder = mteb(dev=[{"query-id": "q2", "corpus-id": "d2", "score": 999_999_999}])
    data = load_dataset(f"hf:{folder}")
    assert data.qrels == {"q1": {"d1": 2}, "q2": {"d9": 1}} and data.facts["overlap"] == {}
    assert f"split dev cannot be compared with test: hf:{folder}/dev:1: the score 999999999 is too large" in data.notes[-1]


def test_hidden_files_are_nobodys_split_and_quotes_are_csvs(tmp_path: Path) -> None:
    write(tmp_path / "beir", {"corpus": {"corpus": DOCUMENTS}, "queries": {"queries": QUERIES}})
    qrels = tmp_path / "beir-qrels"
    for name in ("test.tsv", ".ipynb_checkpoints/test-checkpoint.tsv", ".backup/train.tsv"):
        (qrels / name).parent.mkdir(exist_ok=True)
        (qrels / name).write_text('query-id\tcorpus-id\tscore\n"q1"\t"d1"\t2.0\n')
    for name in ("._test.tsv", "._train.tsv"):
        (qrels / name).write_bytes(b"\x00\x05\x16\x07\x00\xff")
    data = load_dataset(f"hf:{tmp_path}/beir")
    assert (data.qrels, data.facts["overlap"], data.notes) == ({"q1": {"d1": 2}}, {}, [])
    with pytest.raises(UserError, match=r"no split 'train'; it has test$"):
        load_dataset(f"hf:{tmp_path}/beir", "train")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"documents": [{"docid": "d1", "text": "x"}]}, "mteb/corpus/corpus:1: no _id"),
        ({"documents": [*DOCUMENTS, {"_id": "d3", "title": "", "text": None}]}, "mteb/corpus/corpus:3: text .* is missing"),
        ({"documents": DOCUMENTS * 2}, "mteb/corpus/corpus:3: document id 'd1' stands here a second time"),
        ({"documents": []}, "mteb"),
        ({"queries": [{"_id": "q1", "question": "x"}]}, "mteb/queries/queries:1: text .* is missing"),
        ({"test": [{"qid": "q1", "docid": "d1", "rel": 1}], "dev": [{"qid": "q1", "docid": "d1", "rel": 1}]}, "columns query-id, corpus-id and score, not qid"),
        *(
            ({"test": [row], "dev": [row]}, f"mteb/test:1: {message}")
            for row, message in [
                ({"query-id": "q1", "corpus-id": "d1", "score": 0.5}, "the score 0.5 is no whole number"),
                ({"query-id": "q1", "corpus-id": "d1", "score": float("nan")}, "the score nan is no whole number"),
                ({"query-id": "q1", "corpus-id": "d1", "score": float("inf")}, "the score inf is no whole number"),
                ({"query-id": "q1", "corpus-id": "d1", "score": "one"}, "the score 'one' is no whole number"),
                ({"query-id": "q1", "corpus-id": "d1", "score": None}, "the score None is no whole number"),
                ({"query-id": "q1", "corpus-id": "d1", "score": "1.5"}, "the score '1.5' is no whole number"),
                ({"query-id": "q1", "corpus-id": "d1", "score": 999_999_999}, "the score 999999999 is too large"),
                ({"query-id": "q1", "corpus-id": "d1", "score": -1e300}, r"the score -1e\+300 is too large"),
                ({"query-id": None, "corpus-id": "d1", "score": 1}, "the query-id or the corpus-id is missing"),
            ]
        ),
        ({"test": [TEST[0], TEST[0] | {"score": 1}]}, "mteb/test:2: query q1 and document d1 are judged twice, 2 and 1"),
    ],
)
def test_wrong_columns_and_values_are_refused_with_their_place(mteb: Callable[..., Path], parts: dict[str, Rows], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(f"hf:{mteb(**parts)}")


def test_files_that_do_not_parse_are_refused_with_the_reason(mteb: Callable[..., Path]) -> None:
    folder = mteb()
    (folder / "corpus" / "corpus.jsonl").write_text("{]\n")
    with pytest.raises(UserError, match=r"mteb cannot be read: .*JSON parse error"):
        load_dataset(f"hf:{folder}")


def test_missing_configurations_are_named(tmp_path: Path) -> None:
    write(tmp_path / "half", {"corpus": {"corpus": DOCUMENTS}, "default": {"test": TEST}})
    with pytest.raises(UserError, match="no configuration queries; it has corpus, default"):
        load_dataset(f"hf:{tmp_path}/half")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="no configuration corpus or queries; it has default"):
        load_dataset(f"hf:{tmp_path}/plain")


@pytest.mark.parametrize("name", ["no-such-collection", "nobody/nothing", "/no/such/folder", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} cannot be read: " if name else "needs a name"):
        load_dataset(f"hf:{name}")


def test_an_edited_folder_is_read_anew(mteb: Callable[..., Path]) -> None:
    before = load_dataset(f"hf:{mteb()}")
    after = load_dataset(f"hf:{mteb(documents=[DOCUMENTS[0], DOCUMENTS[1] | {'text': 'edited'}])}")
    assert after.corpus["d2"] == "edited" and after.hash != before.hash


def test_nothing_is_drawn_where_there_is_no_terminal(mteb: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    load_dataset(f"hf:{mteb()}")
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def local_irds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "irds"))
    ir_datasets = pytest.importorskip("ir_datasets")
    texts = {"docs_tsv": "d1\tfirst\nd2\tsecond\n", "queries_tsv": "q1\twhich\nq2\twhat\n", "qrels_trec": "q1 0 d1 2\nq2 0 d9 1\n"}

    def register(name: str, **changed: str | None) -> str:
        files = {}
        for kind, text in (texts | changed).items():
            files[kind] = tmp_path / f"{kind}.txt"
            files[kind].write_text(text or "")
        name = f"{tmp_path.name}/{name}"  # the registry is global, so each test needs a name of its own
        ir_datasets.registry.register(name, ir_datasets.create_dataset(**{kind: str(files[kind]) for kind in files if (texts | changed)[kind] is not None}))
        return f"irds:{name}"

    return register


@pytest.mark.parametrize(("name", "split"), [("small", "test"), ("small/test", "test"), ("small/train", "train"), ("small/judged", "test")])
def test_ir_datasets_are_read_with_the_split_of_their_id(local_irds: Callable[..., str], name: str, split: str) -> None:
    spec = local_irds(name)
    data = load_dataset(spec, split)
    assert (data.name, data.split) == (spec.removeprefix("irds:").replace("/", "-"), split)
    assert (data.corpus, data.queries) == ({"d1": "first", "d2": "second"}, {"q1": "which", "q2": "what"})
    assert data.qrels == {"q1": {"d1": 2}, "q2": {"d9": 1}}
    assert data.facts["overlap"] == {}
    with pytest.raises(UserError, match=f"no split 'other'; it has {split}"):
        load_dataset(spec, "other")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qrels_trec": None}, "it has no judgements at all"),
        ({"docs_tsv": None}, "cannot be read: AttributeError: docs_iter"),
        ({"qrels_trec": "q1 0 d1 two\n"}, "cannot be read: ValueError"),
        ({"docs_tsv": "d1\tfirst\nd1\tagain\n"}, ":2: document id 'd1' stands here a second time"),
        ({"qrels_trec": "q1 0 d1 2\nq1 0 d1 1\n"}, "judged twice, 2 and 1"),
        ({"qrels_trec": "q1 0 d1 2\nq2 0 d2 999999999\n"}, ":2: the score 999999999 is too large"),
    ],
)
def test_ir_datasets_that_lack_or_spoil_a_part_are_refused(local_irds: Callable[..., str], changed: dict[str, str | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(local_irds("bad", **changed))


def test_an_unknown_ir_datasets_id_is_refused() -> None:
    pytest.importorskip("ir_datasets")
    with pytest.raises(UserError, match="no/such cannot be read: KeyError"):
        load_dataset("irds:no/such")


def test_without_ir_datasets_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ir_datasets") is not None:
        monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(UserError, match=r"irds:vaswani needs ir_datasets: pip install 'rerank_lab\[irds\]'"):
        load_dataset("irds:vaswani")
