"""Candidates by a sparse encoder are the documents of the highest dot product."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rerank_lab.datasets.dataset import Dataset
from rerank_lab.datasets.load import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.first_stage import file_of, find
from rerank_lab.first_stage.candidates import Candidates, make_candidates
from rerank_lab.first_stage.splade import Index
from rerank_lab.models.base import SparseVectors
from tests.conftest import ROOT
from tests.models.checkpoints import bi_encoder, splade

sys.path.insert(0, str(ROOT / "experiments" / "references"))
import sparse_encoder as reference


def candidates(dataset: Dataset, folder: Path, k: int) -> Candidates:
    return make_candidates(
        f"splade:{folder}", dataset, k, search=lambda ids, queries, k: [], drop_identical=False, progress=lambda items, title: items, device="cpu"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return splade(tmp_path_factory.mktemp("splade"), about={"max_active_dims": 50, "prompts": {"query": "query: ", "document": ""}})


def test_scores_are_sparse_encoders_and_ties_stay_in_corpus_order(model: Path, beir: Callable[..., Path]) -> None:
    dataset = load_dataset(str(beir()), "test")
    corpus = dict(dataset.corpus)
    last = list(corpus)[-1]
    dataset = replace(dataset, corpus={"again": corpus[last], **corpus, "empty": ""})
    found = candidates(dataset, model, 4)
    assert found.source == "splade"
    for query, ranked in found.run.items():
        wanted = reference.scores(model, dataset.queries[query], list(dataset.corpus.values()))
        best = sorted((-round(score, 3), i) for i, score in enumerate(wanted) if score > 0)[:4]
        assert ranked.documents == [list(dataset.corpus)[i] for _, i in best]
        assert ranked.scores.tolist() == pytest.approx(sorted((score for score in wanted if score > 0), reverse=True)[:4], rel=1e-6, abs=1e-4)
    about = found.details
    assert (
        about["model"] == str(model) and about["token_limit"] == 46 and json.loads(str(about["model_reading"])) == {"max_active": 50, "query_prompt": "query: "}
    )
    assert 0 < float(str(about["nonzeros_per_document"])) <= 50 == about["nonzeros_per_query"] and len(str(about["model_files"])) == 64


def test_documents_that_share_no_word_are_left_out() -> None:
    def vectors(*texts: dict[int, float]) -> SparseVectors:
        ends = np.cumsum([0, *map(len, texts)])
        words = np.array([word for text in texts for word in text], dtype=np.int32)
        return SparseVectors(ends, words, np.array([weight for text in texts for weight in text.values()], dtype=np.float32))

    index, query = Index(vectors({0: 1.0, 3: 2.0}, {}, {3: 0.5}, {7: 1.0})), vectors({3: 2.0, 9: 4.0})
    assert index.scores(query.words, query.weights).tolist() == [4.0, 0.0, 1.0, 0.0]
    assert Index(vectors()).scores(query.words, query.weights).tolist() == [] and Index(vectors({}, {})).scores(query.words, query.weights).tolist() == [
        0.0,
        0.0,
    ]


def test_the_model_is_a_name_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("splade:naver/splade-v3")[1] == "naver/splade-v3" and find("splade:~/m")[1] == str(tmp_path / "m")
    assert file_of("splade:naver/splade-v3") is None
    with pytest.raises(UserError, match="are not known; valid: bm25, dense, splade:MODEL"):
        find("splade")


def test_another_family_is_refused(beir: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a bi-encoder .*, and a sparse encoder is needed here; give it as --model"):
        candidates(load_dataset(str(beir()), "test"), bi_encoder(tmp_path / "m"), 3)


def test_an_evaluation_reranks_them(model: Path, beir: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["--dataset", str(beir()), "--candidates", f"splade:{model}", "--model-cross", "none", "--methods", "fast", "--device", "cpu"]
    assert main([*arguments, "--cold-queries", "0", "--no-cache", "--top-k", "3", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["candidates"]
    assert found["source"] == "splade" and found["model"] == str(model)
