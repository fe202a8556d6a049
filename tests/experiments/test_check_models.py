"""The command that holds every model folder against its reference, on a small checkpoint of each family."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.models.checkpoints import bi_encoder, cross_encoder, late_interaction, model2vec, put, splade, stanford, static, transformer
from tests.models.decoders import decoder, logit_score

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
import check_models as script

FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "bi": (lambda f: bi_encoder(f, "Normalize"), "bi-encoder, `fast`"),
    "static": (static, "static embedding model, `fast`"),
    "model2vec": (model2vec, "static embedding model, `fast`"),
    "pylate": (late_interaction, "late-interaction model, `maxsim`"),
    "stanford": (stanford, "late-interaction model, `maxsim`"),
    "cross": (cross_encoder, "cross-encoder, `standard`"),
    "scored": (logit_score, "causal reranker, `standard`"),
    "Qwen3-Reranker-tiny": (decoder, "causal reranker, `standard`"),
    "splade": (splade, "sparse encoder, `splade`"),
    "tagger": (lambda f: transformer(f, "BertForTokenClassification"), "refused"),
    "lora": (lambda f: put(transformer(f), {"adapter_config.json": {"base_model_name_or_path": "base"}}), "refused"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkpoints")
    for name, (make, _) in FAMILIES.items():
        (place / name).mkdir()
        make(place / name)
    return place


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_models", *words])
    return script.main()


def test_every_family_is_equal_to_its_reference_or_refused(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nan older table\n{script.END}\nafter\n")
    assert call(monkeypatch, "--checkpoints", str(folders), "--write", str(page)) == 0
    lines = page.read_text().splitlines()
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| "))}
    assert lines[0] == "before" and lines[-1] == "after" and "an older table" not in lines
    for name, (_, read_as) in FAMILIES.items():
        assert rows[name][1] == read_as, rows[name]
        assert rows[name][4] == "equal" or (read_as == "refused" and len(rows[name][4]) > 20 and str(folders) not in rows[name][4])
        assert all(float(cell) <= script.TOLERANCE for cell in rows[name][2:4] if cell)
        assert read_as == "refused" or rows[name][2]


def test_a_score_that_differs_is_told(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = script._scores
    monkeypatch.setattr(script, "_scores", lambda reranker, query, documents: [score + 1e-3 for score in real(reranker, query, documents)])
    assert call(monkeypatch, "--checkpoints", str(folders), "bi", "tagger") == 1
    assert "**differs**" in capsys.readouterr().out


def test_a_folder_without_models_and_a_page_without_a_place_are_told(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "--checkpoints", str(tmp_path))
    (tmp_path / "page.md").write_text("no place")
    with pytest.raises(SystemExit):
        call(monkeypatch, "--checkpoints", str(folders), "--write", str(tmp_path / "page.md"), "lora")
    assert (tmp_path / "page.md").read_text() == "no place"
