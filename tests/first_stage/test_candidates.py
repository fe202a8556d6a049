"""First stages against references: BM25 by its formula, dense by brute force, run files as they are; and the hash of candidates."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.runs import Ranked
from rerank_lab.errors import UserError
from rerank_lab.eval.executors.base import merged, search_block
from rerank_lab.first_stage.base import QUERY_BATCH, TopK
from rerank_lab.first_stage.candidates import Candidates, make_candidates, oracle
from rerank_lab.first_stage.lexical import BM25, PARAMETERS
from rerank_lab.models.base import Detail
from rerank_lab.models.bi_encoder import BiEncoder
from tests.conftest import DOCUMENTS, QRELS, QUERIES

Beir = Callable[..., Path]
FRUIT = {
    "d1": ("", "The apples and an apple by a banana"),
    "d2": ("", "banana, cherry; cherry: BANANA"),
    "d3": ("", "cherry"),
    "d4": ("", "cherry"),
    "d5": ("", ""),
}


def silent(items: Iterable[Any], title: str) -> Iterable[Any]:
    return items


def unused(*arguments: object) -> list[TopK]:
    raise AssertionError("only dense encodes")


def rounded(vectors: torch.Tensor, noise: float) -> torch.Tensor:
    return vectors + noise * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))


def find(
    folder: Path, source: str, top_k: int = 10, encoder: BiEncoder | None = None, drop_identical: bool = False, noise: float = 0, blocks: int = 1 << 20
) -> Candidates:
    data = load_dataset(str(folder))

    def search(ids: Sequence[str], queries: Sequence[str], fetch: int) -> list[TopK]:
        assert encoder is not None
        vectors = rounded(encoder.encode([data.corpus[i] for i in ids], detail=Detail.POOLED).pooled, noise)
        batches = torch.split(encoder.encode(queries, kind="query", detail=Detail.POOLED).pooled, QUERY_BATCH)
        return merged((search_block(batches, block, fetch) for block in torch.split(vectors, blocks)), fetch, blocks)

    return make_candidates(source, data, top_k, search=unused if encoder is None else search, drop_identical=drop_identical, progress=silent)


def run_file(folder: Path, *lines: str) -> str:
    path = folder / "first.trec"
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"run:{path}"


def test_bm25_is_lucenes_formula() -> None:
    documents = [["appl", "appl", "banana"], ["banana", "cherri", "cherri", "banana"], ["cherri"], ["cherri"], []]  # stop words out, stems in
    mean = sum(map(len, documents)) / len(documents)

    def score(terms: list[str], document: list[str]) -> float:
        total = 0.0
        for term in terms:
            df, tf = sum(term in d for d in documents), document.count(term)
            total += math.log(1 + (len(documents) - df + 0.5) / (df + 0.5)) * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    index = BM25([text for _, text in FRUIT.values()])
    for query, terms in {"the apple": ["appl"], "Bananas or CHERRIES": ["banana", "cherri"], "apple apple kiwi": ["appl", "appl"]}.items():
        assert index.scores(query) == pytest.approx([score(terms, d) for d in documents], rel=1e-6)
    assert (PARAMETERS["method"], PARAMETERS["k1"], PARAMETERS["b"]) == ("lucene", 1.2, 0.75)


@pytest.mark.parametrize("documents", [[], [""], ["the and of"], ["apple"]])
@pytest.mark.parametrize("query", ["", "the", "kiwi", "?!"])
def test_bm25_without_a_match_is_all_zero(documents: list[str], query: str) -> None:
    assert BM25(documents).scores(query).tolist() == [0.0] * len(documents)


def test_bm25_candidates_match_a_term_and_tie_in_corpus_order(beir: Beir) -> None:
    queries = {"q1": "cherries", "q2": "the of and", "q3": "kiwi", "q4": " "}
    found = find(beir(documents=FRUIT, queries=queries, qrels={q: {"d1": 1} for q in queries}), "bm25")
    assert {q: r.documents for q, r in found.run.items()} == {"q1": ["d3", "d4", "d2"]}
    scores = found.run["q1"].scores
    assert scores[0] == scores[1] > scores[2] > 0 and scores.dtype == np.float32
    assert found.details["parameters"] == PARAMETERS and found.details["queries_without"] == 3
    assert found.notes == ["3 of 4 judged queries have no candidates: they score 0 and count"]


@pytest.mark.parametrize("blocks", [100, 4, 1])
def test_dense_is_brute_force(beir: Beir, encoder: BiEncoder, blocks: int) -> None:
    found = find(beir(queries=QUERIES | {"q5": " "}, qrels=QRELS | {"q5": {"d1": 1}}), "dense", encoder=encoder, blocks=blocks)
    assert list(found.run) == list(QUERIES)
    ids, texts = list(DOCUMENTS), [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    vectors = encoder.encode(texts, detail=Detail.POOLED).pooled.double().numpy()
    for q, text in QUERIES.items():
        cosine = vectors @ encoder.encode([text], kind="query", detail=Detail.POOLED).pooled[0].double().numpy()
        assert found.run[q].documents == [ids[i] for i in np.argsort(-cosine)]
        assert found.run[q].scores == pytest.approx(np.sort(cosine)[::-1], abs=1e-6)
    assert found.documents_per_query == 6


@pytest.mark.parametrize("top_k", [1, 7, 40, 60])
def test_dense_keeps_equal_texts_in_corpus_order(beir: Beir, encoder: BiEncoder, top_k: int) -> None:
    texts = {f"d{i}": ("", "Sort by the values." if i % 2 else f"Value number {i}.") for i in range(60)}
    found = find(beir(documents=texts), "dense", top_k, encoder, noise=1e-7)  # rounding depends on a row's position in a matrix product
    for ranked in found.run.values():
        assert len(ranked.documents) == top_k
        same = [i for i, d in enumerate(ranked.documents) if int(d[1:]) % 2]
        assert [ranked.documents[i] for i in same] == [f"d{i}" for i in range(1, 60, 2)][: len(same)]
        assert len(set(ranked.scores[same].tolist())) <= 1 and (np.diff(ranked.scores) <= 0).all()


def test_a_run_is_ordered_by_score_and_ties_as_the_file_has_them(beir: Beir) -> None:
    folder = beir()
    lines = ["q1 Q0 d1 1 0.5 x", "q1 Q0 d2 2 9.5 x", "q1\tQ0\td3\t3\t0.5\tx", "", "q1 Q0 d4 4 1e1 x", "q3 Q0 d5 1 -2 x", "q3 Q0 d1 2 -1 x"]
    found = find(folder, run_file(folder, *lines))
    assert {q: r.documents for q, r in found.run.items()} == {"q1": ["d4", "d2", "d1", "d3"], "q3": ["d1", "d5"]}
    assert found.run["q1"].scores.tolist() == [10, 9.5, 0.5, 0.5]
    assert found.details["file"] == "first.trec" and found.details["queries_without"] == 2


def test_unknown_queries_and_documents_of_a_run_are_counted_and_left_out(beir: Beir) -> None:
    folder = beir(queries=QUERIES | {"q9": "not judged"})
    lines = ["q1 Q0 gone 1 3 x", "q1 Q0 d1 2 2 x", "q1 Q0 lost 3 1 x", "q9 Q0 gone 1 1 x", "q8 Q0 d1 1 1 x", "q2 Q0 gone 1 1 x"]
    found = find(folder, run_file(folder, *lines), top_k=1)
    assert {q: r.documents for q, r in found.run.items()} == {"q1": ["d1"]}  # top_k is applied afterwards
    assert [n for n in found.notes if "2 queries have no judgement in this split (q9, q8 …)" in n]
    assert [n for n in found.notes if "3 candidates are not in the corpus" in n]
    with pytest.raises(UserError, match=r"none of its queries and documents belong to small \(test\)"):
        find(folder, run_file(folder, "q8 Q0 d1 1 1 x", "q1 Q0 gone 1 1 x"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 d2 2 1", "a TREC run line has 6 columns .*, not 5"),
        ("q1 Q0 d 2 2 1 x", "a TREC run line has 6 columns .*, not 7"),
        ("q1 Q0 d2 2 high x", "the score 'high' is no number"),
        ("q1 Q0 d2 2 nan x", "the score 'nan' is not finite"),
        ("q1 Q0 d2 2 -inf x", "the score '-inf' is not finite"),
        ("q1 Q0 d2 2 1e39 x", "the score '1e39' is not finite"),
        ("q1 Q0 d1 2 0 x", "document d1 stands twice for query q1"),
    ],
)
def test_a_malformed_run_is_refused_with_file_and_line(beir: Beir, line: str, message: str) -> None:
    folder = beir()
    with pytest.raises(UserError, match=rf"first\.trec:3: {message}"):
        find(folder, run_file(folder, "q1 Q0 d1 1 2 x", "", line))


def test_a_run_that_is_no_file_or_no_text_is_refused(beir: Beir) -> None:
    folder = beir()
    with pytest.raises(UserError, match=r"none\.trec: No such file"):
        find(folder, f"run:{folder}/none.trec")
    with pytest.raises(UserError, match="Is a directory"):
        find(folder, f"run:{folder}")
    (folder / "first.trec").write_bytes(b"q1 Q0 d1 1 1 \xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        find(folder, f"run:{folder}/first.trec")


@pytest.mark.parametrize("source", ["bm25", "dense", "run"])
def test_top_k_cuts_and_identical_ids_go_before_the_cut_on_request(beir: Beir, encoder: BiEncoder, source: str) -> None:
    text = {f"d{i}": ("", "cherry " * i + "banana") for i in range(1, 6)}
    folder = beir(documents=text, queries={"d4": "cherry banana", "q": "cherry"}, qrels={"d4": {"d1": 1}, "q": {"d1": 1}})
    name = run_file(folder, *(f"{q} Q0 d{i} 1 {i} x" for q in ("d4", "q") for i in range(1, 6))) if source == "run" else source
    whole, cut, dropped = (find(folder, name, k, encoder, drop) for k, drop in [(5, False), (2, False), (5, True)])
    assert {q: r.documents[:2] for q, r in whole.run.items()} == {q: r.documents for q, r in cut.run.items()}
    assert sorted(whole.run["d4"].documents) == ["d1", "d2", "d3", "d4", "d5"]
    assert dropped.run["d4"].documents == [d for d in whole.run["d4"].documents if d != "d4"]
    assert dropped.run["q"].documents == whole.run["q"].documents
    first = whole.run["d4"].documents.index("d4") + 1  # if the candidates end at d4, the next one moves up
    moved = find(folder, name, first, encoder, True).run["d4"]
    assert moved.documents == [d for d in whole.run["d4"].documents if d != "d4"][:first] and len(moved.scores) == len(moved.documents)


def test_the_hash_is_of_ids_in_order(beir: Beir) -> None:
    folder = beir()

    def digest(*lines: str, top_k: int = 10) -> str:
        value: str = find(folder, run_file(folder, *lines), top_k).hash
        return value

    plain = digest("q1 Q0 d1 1 2 x", "q1 Q0 d2 2 1 x", "q2 Q0 d1 1 1 x")
    assert digest("q2 Q0 d1 7 0.1 y", "q1 Q0 d2 2 5 y", "q1 Q0 d1 1 9 y") == plain  # other scores, ranks, tags and file order
    assert digest("q1 Q0 d1 1 2 x", "q1 Q0 d2 2 1 x", "q1 Q0 d3 3 0 x", "q2 Q0 d1 1 1 x", top_k=2) == plain
    others = [
        digest("q1 Q0 d1 1 1 x", "q1 Q0 d2 2 2 x", "q2 Q0 d1 1 1 x"),
        digest("q1 Q0 d1 1 2 x", "q1 Q0 d3 2 1 x", "q2 Q0 d1 1 1 x"),
        digest("q1 Q0 d1 1 2 x", "q2 Q0 d2 2 1 x", "q2 Q0 d1 1 1 x"),
        digest("q1 Q0 d1 1 2 x", "q1 Q0 d2 2 1 x", "q3 Q0 d1 1 1 x"),
        digest("q1 Q0 d1 1 2 x", "q1 Q0 d2 2 1 x"),
    ]
    assert len({plain, *others}) == 6


def test_the_oracle_orders_by_grade_then_as_it_was(beir: Beir) -> None:
    data = load_dataset(str(beir(qrels=QRELS | {"q1": {"d4": 2, "d2": 1, "d3": 1, "d1": -1}})))
    best = oracle({"q1": Ranked(["d1", "d2", "d6", "d3", "d4"], np.arange(5, 0, -1, dtype=np.float32))}, data)
    assert best["q1"].documents == ["d4", "d2", "d3", "d6", "d1"]
    assert best["q1"].scores.tolist() == [2, 1, 1, 0, -1]


@pytest.mark.parametrize("source", ["", "bm42", "bm25:x", "dense:x", "run", "run:"])
def test_an_unknown_source_is_refused_with_those_known(beir: Beir, source: str) -> None:
    with pytest.raises(UserError, match=f"candidates '{source}' are not known; valid: bm25, dense, splade:MODEL, run:FILE"):
        find(beir(), source)


def test_a_parquet_file_is_read_as_the_trec_run_is(beir: Callable[..., Path], tmp_path: Path) -> None:
    folder = beir()
    rows = [("q1", "d2", 0.5), ("q2", "d3", 2.0), ("q1", "d1", 1.5), ("q1", "d4", 0.5), ("nobody", "d1", 1.0)]
    trec = find(folder, run_file(folder, *(f"{q} Q0 {d} 0 {score} x" for q, d, score in rows)))
    frame = pd.DataFrame(rows, columns=["query", "document", "score"])
    frame.to_parquet(tmp_path / "first.parquet")
    parquet = find(folder, f"run:{tmp_path / 'first.parquet'}")
    assert parquet.hash == trec.hash
    assert {q: r.documents for q, r in parquet.run.items()} == {"q1": ["d1", "d2", "d4"], "q2": ["d3"]}
    assert parquet.run["q1"].scores.tolist() == [1.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.rename(columns={"score": "s"}), "needs the columns query, document and score, a value each, and has query, document, s"),
        (lambda f: f.assign(score=[1.0, math.nan, 2.0]), "row 2 has a score that is not finite"),
        (lambda f: f.assign(query=["q1", None, "q2"]), "row 2 has no query"),
        (lambda f: f.assign(score=["a", "b", "c"]), "score holds no numbers"),
        (lambda f: f.assign(query="q1", document="d1"), "document d1 stands twice for query q1"),
        (lambda f: f.assign(method=["fast", "best", "best"]), "several methods (fast, best"),
    ],
)
def test_a_parquet_file_that_is_no_run_is_refused(beir: Callable[..., Path], tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    frame = change(pd.DataFrame({"query": ["q1", "q1", "q2"], "document": ["d1", "d2", "d3"], "score": [3.0, 2.0, 1.0]}))
    frame.to_parquet(tmp_path / "first.parquet")
    with pytest.raises(UserError, match=re.escape(message)):
        find(beir(), f"run:{tmp_path / 'first.parquet'}")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "first.parquet").read_bytes()[:-40])
    with pytest.raises(UserError, match="no Parquet file that can be read"):
        find(beir("other"), f"run:{cut}")


ROWS = {"q1": {"d2": 0.5, "d4": 3, "d1": 1.5}, "q2": {"d3": -2.0}, "nobody": {"d1": 1.0}}
PREDICTIONS = {"mteb_model_meta": {"model_name": "m", "revision": None}, "default": {"dev": {"q1": {"d6": 1.0}}, "test": ROWS}}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["trec", "parquet", "ranx", "mteb", "older mteb"])
def test_a_run_is_told_by_its_content_packed_or_not(beir: Beir, tmp_path: Path, kind: str, packed: bool) -> None:
    folder, path = beir(), tmp_path / "first.run"
    lines = [f"{q} Q0 {d} 0 {score} x" for q, scored in ROWS.items() for d, score in scored.items()]
    if kind == "parquet":
        pd.DataFrame([(q, d, s) for q, scored in ROWS.items() for d, s in scored.items()], columns=["query", "document", "score"]).to_parquet(path)
    else:
        text = "\n".join(lines) if kind == "trec" else json.dumps(PREDICTIONS if kind == "mteb" else {"en": {"test": ROWS}} if "older" in kind else ROWS)
        path.write_text(text if kind == "trec" else f"\n {text}", encoding="utf-8-sig")
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    made = find(folder, f"run:{path}")
    assert {q: r.documents for q, r in made.run.items()} == {"q1": ["d4", "d1", "d2"], "q2": ["d3"]}
    assert made.run["q1"].scores.tolist() == [3, 1.5, 0.5] and made.hash == find(folder, run_file(folder, *lines)).hash
    assert len([note for note in made.notes if "1 queries have no judgement in this split (nobody" in note]) == 1
    if packed:
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(UserError, match=r"first\.run: damaged or cut off, gzip cannot unpack it"):
            find(folder, f"run:{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"q1": {"d1": 1, "d2": 1, "d1": 2}}', "'d1' stands twice in one object"),
        ('{"q1": {"d1": 1}, "q1": {"d2": 2}}', "'q1' stands twice in one object"),
        ('{"q1": {"d1": NaN}}', "query q1, document d1: the score 'nan' is no number that is finite in fp32"),
        ('{"q1": {"d1": -Infinity}}', "the score '-inf' is no number that is finite"),
        ('{"q1": {"d1": 1e39}}', "the score '1e+39' is no number that is finite"),
        ('{"q1": {"d1": ' + "9" * 400 + "}}", "is no number that is finite"),
        ('{"q1": {"d1": "3"}}', "the score '3' is no number"),
        ('{"q1": {"d1": null}}', "the score 'None' is no number"),
        ('{"q1": {"d1": true}}', "the score 'True' is no number"),
        ('{"q1": ["d1", "d2"]}', "a run in JSON is {query: {document: score}}"),
        ('[{"q1": {"d1": 1}}]', "a run in JSON is {query: {document: score}}"),
        ('{"q1": {"d1": 1}', "neither JSON (Expecting"),
        ("[" * 100_000, "neither JSON ("),
        ('{"q1": {"d1": 1}}\n{"q2": {"d1": 1}}', "neither JSON (Extra data"),
        ('{"mteb_model_meta": {}, "en": {"test": {}}, "fr": {"test": {}}}', "MTEB's predictions of 2 subsets (en, fr); keep those of one"),
        ('{"mteb_model_meta": {}, "default": {"dev": {"q1": {"d1": 1}}}}', "MTEB's predictions of dev, and not of the split 'test'"),
        ('{"mteb_model_meta": {}, "default": {"test": [1, 2]}}', "a run in JSON is {query: {document: score}}"),
        ("{}", "none of its queries and documents belong to small"),
    ],
)
def test_json_that_is_no_run_is_refused(beir: Beir, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        find(beir(), f"run:{tmp_path / 'run.json'}")


def test_parquet_of_pandas_is_read_whatever_its_index(beir: Beir, tmp_path: Path) -> None:
    frame = pd.DataFrame({"query": ["q1", "q1"], "document": ["d2", "d1"], "score": [1.0, 2.0]})
    found = []
    for i, index in enumerate((None, "query", ["query", "document"])):
        (frame if index is None else frame.set_index(index)).to_parquet(tmp_path / f"{i}.parquet")
        found.append(find(beir(), f"run:{tmp_path / f'{i}.parquet'}").run["q1"].documents)
    assert found == [["d1", "d2"]] * 3


def test_a_run_in_utf_16_is_told_so(beir: Beir, tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text("q1 Q0 d1 1 1 x\n", encoding="utf-16")
    with pytest.raises(UserError, match="text in UTF-16, as PowerShell's > writes it; save it as UTF-8"):
        find(beir(), f"run:{tmp_path / 'run.trec'}")


@pytest.mark.parametrize(("pack", "name"), [(bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_run_of_another_packer_is_named(beir: Beir, tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    (tmp_path / "run.trec").write_bytes(pack(b"q1 Q0 d1 1 1 x\n"))
    with pytest.raises(UserError, match=rf"run\.trec: packed with {name}, and of such gzip alone is read: unpack it"):
        find(beir(), f"run:{tmp_path / 'run.trec'}")


@pytest.mark.parametrize(
    ("top_k", "said"), [(10, "5 candidates of 2 queries"), (4, "5 candidates of 2 queries"), (3, "4 candidates of 2 queries"), (2, "2 candidates of 1 queries")]
)
def test_ties_keep_the_files_order_and_a_note_says_so_where_they_are_ranked(beir: Beir, top_k: int, said: str) -> None:
    folder = beir()
    lines = ["q1 Q0 d3 1 2 x", "q1 Q0 gone 2 1 x", "q1 Q0 d1 3 1 x", "q1 Q0 d2 4 1 x", "q1 Q0 d5 5 1 x"]
    lines += ["q2 Q0 d6 1 7 x", "q2 Q0 d3 2 7 x", "q3 Q0 d1 1 2 x", "q3 Q0 gone 2 2 x", "nobody Q0 d1 1 1 x", "nobody Q0 d2 1 1 x"]
    if top_k == 2:
        lines = [line.replace("q1 Q0 d1 3 1 x", "q1 Q0 d1 3 1.5 x") for line in lines]
    made = find(folder, run_file(folder, *lines), top_k)
    assert {q: r.documents for q, r in made.run.items()} == {"q1": ["d3", "d1", "d2", "d5"][:top_k], "q2": ["d6", "d3"], "q3": ["d1"]}
    notes = [note for note in made.notes if "have another's score" in note]
    assert len(notes) == 1 and said in notes[0] and "here the full score decides, then the place in the file" in notes[0]
    assert not [note for note in find(folder, run_file(folder, *lines[:1])).notes if "score" in note and "have" in note and "another" in note]
