"""A first stage in one file, registered only by this test, works everywhere: evaluation and report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.runs import Ranked
from rerank_lab.errors import ModelError, UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.first_stage import FIRST_STAGES, Context, FirstStage, file_of, find
from rerank_lab.first_stage.candidates import make_candidates
from tests.conftest import DOCUMENTS, QUERIES, report_of
from tests.eval.test_eval import failing, load
from tests.models.checkpoints import splade
from tests.toys.first_stage import KIND, Longest


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIRST_STAGES, KIND.name, KIND)


def test_a_new_first_stage_is_evaluated_and_reported(registered: None, beir: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--dataset", str(beir()), "--candidates", "longest:a", "--top-k", "4", "--methods", "fast,best", "--out", str(out)]
    assert main(arguments) == 0
    texts = {i: f"{title} {text}".strip() for i, (title, text) in DOCUMENTS.items()}
    wanted = sorted((i for i in texts if "a" in texts[i]), key=lambda i: -len(texts[i]))[:4]
    result = load(out)
    found = result["candidates"]
    assert list(found)[:7] == ["source", "word", "drop_identical_ids", "queries_without", "top_k", "hash", "documents_per_query"]
    assert (found["source"], found["word"], found["queries_without"]) == ("longest", "a", 0) and "documents lack the word a" in found["notes"][0]
    for line in (out / "runs" / "best.trec").read_text().splitlines():
        assert line.split()[2] in wanted
    assert len((out / "runs" / "fast.trec").read_text().splitlines()) == len(wanted) * len(QUERIES)
    assert "longest" in report_of(out) and "documents lack the word a" in report_of(out)
    assert main([*arguments, "--resume"]) == 0, "what is finished is taken as it is"


def test_help_and_refusals_follow_from_the_registry(registered: None, beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--candidates bm25|dense|splade:MODEL|run:FILE|longest:WORD" in said and "longest:WORD, the longest that hold WORD" in said
    for wrong in ("longest", "longest:", "bm42", "dense:x"):
        message = f"candidates '{wrong}' are not known; valid: bm25, dense, splade:MODEL, run:FILE, longest:WORD"
        assert message in failing(capsys, "--dataset", str(beir()), "--candidates", wrong, "--methods", "fast", "--out", str(tmp_path / "out"))


def test_each_is_what_it_declares(beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_of("run:~/x.trec") == tmp_path / "x.trec" and file_of("bm25") is None
    with pytest.raises(UserError, match="candidates 'run' are not known"):
        file_of("run")
    (tmp_path / "x.trec").write_text("q1 Q0 d1 1 1 x\n")
    for name, declared in FIRST_STAGES.items():
        stage, argument = find({"run": "run:~/x.trec", "splade": f"splade:{splade(tmp_path / 'm')}"}.get(name, name))
        made: FirstStage = stage.make(Context(None, lambda ids, queries, k: [], lambda items, title: items), argument)  # type: ignore[arg-type]
        assert stage is declared and made.notes == [] and json.dumps(made.about())


@pytest.mark.parametrize(
    ("ranked", "message"),
    [
        (Ranked(["d1", "d2", "d3"], np.array([3, 2, 1])), "3 documents with 3 scores, where 2 documents at most were asked for"),
        (Ranked(["d1", "d2"], np.array([1, 2])), "scores must be finite and never rise"),
        (Ranked(["d1", "d9"], np.array([2, 1])), "the corpus has no document 'd9'"),
        (Ranked(["d1", "d1"], np.array([2, 1])), "a document stands there twice"),
    ],
    ids=["too many", "rising", "unknown", "twice"],
)
def test_what_would_make_wrong_figures_is_refused(
    registered: None, beir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, ranked: Ranked, message: str
) -> None:
    monkeypatch.setattr(Longest, "search", lambda self, queries, k: dict.fromkeys(queries, ranked))
    dataset = load_dataset(str(beir()))
    with pytest.raises(ModelError, match=f"first stage longest: query q1: {message}"):
        make_candidates("longest:a", dataset, 2, search=lambda ids, queries, k: [], drop_identical=False, progress=lambda items, title: items)
    monkeypatch.setattr(Longest, "about", lambda self: {"recall@10": 1.0})
    monkeypatch.setattr(Longest, "search", lambda self, queries, k: {})
    with pytest.raises(ModelError, match="its `about` uses the name recall@10"):
        make_candidates("longest:a", dataset, 2, search=lambda ids, queries, k: [], drop_identical=False, progress=lambda items, title: items)
