"""The training script from end to end on a few documents: its adapter loads, and a stopped run ends with the same result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rerank_lab import Reranker
from rerank_lab.datasets import load_dataset
from tests.conftest import DOCUMENTS, ROOT

sys.path.insert(0, str(ROOT / "experiments" / "training"))
import train_cross_encoder as script
from training_lists import labelled, pseudo_queries, read_corpus, split


@pytest.fixture
def train(beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the script on the small collection. The first argument is the work folder; the adapter is written beside it."""
    folder, watched = beir(split="train"), beir("watched", split="train")
    threads = torch.get_num_threads()

    def run(work: str, *arguments: str) -> int:
        argv = [
            "train",
            "--labelled",
            str(folder),
            "--watch",
            str(watched),
            "--held-out",
            "1",
            "--steps",
            "5",
            "--every",
            "2",
            "--lists",
            "2",
            "--work",
            str(tmp_path / work),
        ]
        monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / f"{work}.safetensors"), *arguments])
        try:
            return script.main()
        finally:
            torch.set_num_threads(threads)

    return run


def test_a_stopped_run_goes_on_to_the_same_adapter(train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("whole") == 0
    real = script.Trainer.train

    def stopped(self: script.Trainer) -> Iterator[float]:
        for loss in real(self):
            yield loss
            if self.step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Trainer, "train", stopped)
        assert train("stopped") == 130
    assert not (tmp_path / "stopped.safetensors").exists()
    assert train("stopped") == 0
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-3, rtol=1e-2)
    assert any(name.endswith(".B") and bool(value.any()) for name, value in whole.items()), "it learnt something"
    records = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("dev", {}).keys() == {"small", "watched"}] == [0, 2, 4, 5] and records[0]["config"]["steps"] == 5
    assert (tmp_path / "stopped" / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    ranked = Reranker(None, "standard", str(tmp_path / "whole.safetensors"), device="cpu").rank("join two tables", [text for _, text in DOCUMENTS.values()])
    assert len(ranked) == len(DOCUMENTS)
    assert len(load_dataset(str(tmp_path / "whole" / "dev-small"), "dev").qrels) == 1


def test_another_configuration_or_no_collection_is_refused(train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("work") == 0
    capsys.readouterr()
    assert train("work", "--rate", "1e-3") == 2
    assert "differs in rate" in capsys.readouterr().err
    assert train("other", "--labelled", str(tmp_path / "none")) == 2
    assert "none" in capsys.readouterr().err


def test_it_learns_to_put_the_relevant_document_first(train: Callable[..., int], tmp_path: Path) -> None:
    assert train("work", "--steps", "100", "--every", "100", "--judged", "1", "--smoothing", "0") == 0
    losses = [r["loss"] for r in map(json.loads, (tmp_path / "work" / "log.jsonl").read_text().splitlines()) if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]


def test_text_and_a_teacher_alone_will_do(beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--steps", "2", "--every", "1", "--lists", "1", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "a.safetensors")]
    monkeypatch.setattr(sys, "argv", ["train", "--text", str(beir()), "--teacher", "bm25", *common])
    assert script.main() == 0
    assert load_file(tmp_path / "a.safetensors")["calibration"].tolist() == [1, 0]
    assert json.loads((tmp_path / "w" / "log.jsonl").read_text().splitlines()[1])["dev"] == {}


@pytest.mark.parametrize("arguments", [[], ["--text", "x", "--every", "0"]])
def test_wrong_flags_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--out", "a.safetensors"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_two_folders_of_one_name_are_refused(train: Callable[..., int], beir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("work", "--text", str(beir("other/small"))) == 2
    assert "have one name" in capsys.readouterr().err


def test_held_out_queries_share_no_relevant_document_or_text_with_the_others(beir: Callable[..., Path]) -> None:
    queries = {f"q{i}": f"text {i % 17}" for i in range(40)}
    qrels = {q: {f"d{1 + i % 6}": 1} if i < 6 else {f"d{1 + i % 2}": 1, "d3": 0} for i, q in enumerate(queries)}
    data = labelled(beir(queries=queries, qrels=qrels, split="train"))
    for held_out in (0, 3, 10):
        learnt, held = split(data, held_out, seed=0)
        assert sorted(learnt + held) == sorted(data.qrels) and len(held) <= held_out
        for what in (lambda q: {d for d, g in data.qrels[q].items() if g > 0}, lambda q: {data.queries[q]}):
            assert not set().union(*map(what, learnt)) & set().union(*map(what, held))


def test_made_queries_come_from_their_documents_and_repeat_under_a_seed() -> None:
    corpus = read_corpus(ROOT / "rerank_lab" / "data" / "numpydoc")
    made = pseudo_queries(corpus, 300, seed=1)
    assert made == pseudo_queries(corpus, 300, seed=1) != pseudo_queries(corpus, 300, seed=2)
    assert len({source for _, source in made}) == len(made) > 200
    for query, source in made:
        assert len(query.split()) >= 3 and " ".join(query.split()) in " ".join(corpus[source][1].split())
    assert np.mean([len(query) for query, _ in made]) > 20
