"""A bi-encoder with bge-m3's head for token vectors: pooled vectors as before, token vectors as FlagEmbedding has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rerank_lab import Reranker
from rerank_lab.errors import UserError
from rerank_lab.models.base import Detail
from tests.conftest import DOCUMENTS, QUERIES, ROOT, load_bi
from tests.models.checkpoints import WIDTH, bi_encoder

sys.path.insert(0, str(ROOT / "experiments" / "references"))
import token_head as reference

LONG = "Merge DataFrame or named Series objects with a database-style join. " * 60
TEXTS = ["", "?", "naïve 你好", QUERIES["q1"], LONG]
XLM_R: dict[str, Any] = {"architecture": "XLMRobertaModel", "max_position_embeddings": 514, "limit": 512}
DOCS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()] + [LONG, ""]


def m3(folder: Path, outs: int = 16) -> Path:
    """A bi-encoder with both heads of bge-m3."""
    bi_encoder(folder, "Normalize", **XLM_R)
    g = torch.Generator().manual_seed(5)
    for name, rows in (("colbert_linear.pt", outs), ("sparse_linear.pt", 1)):
        torch.save({"weight": torch.randn(rows, WIDTH, generator=g) * WIDTH**-0.5, "bias": torch.randn(rows, generator=g) * 0.1}, folder / name)
    return folder


def test_vectors_and_scores_are_flag_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = m3(tmp_path / "m3")
    model = load_bi(folder, device="cpu")
    assert "(sparse_linear.pt) is left out" in caplog.text
    for kind in ("query", "document"):
        found = model.encode(TEXTS, kind=kind)
        assert found.tokens.dtype == torch.float32 and found.tokens.shape[1] == model.token_dimensions == 16
        for n, wanted in enumerate(reference.vectors(folder, TEXTS)):
            torch.testing.assert_close(found.row(n).tokens, wanted, atol=1e-5, rtol=0)
    assert model.words(model.tokenize(["join"], "query", 8)[0]) == ["join", "[SEP]"]
    ranking = Reranker(model, "maxsim").score(QUERIES["q1"], DOCS)
    torch.testing.assert_close(ranking.scores, torch.tensor(reference.scores(folder, QUERIES["q1"], DOCS))[ranking.order], atol=1e-4, rtol=0)


def test_pooled_vectors_are_those_without_the_head(tmp_path: Path) -> None:
    model, plain = load_bi(m3(tmp_path / "m3"), device="cpu"), load_bi(bi_encoder(tmp_path / "plain", "Normalize", **XLM_R), device="cpu")
    torch.testing.assert_close(model.encode(TEXTS).pooled, plain.encode(TEXTS).pooled)
    assert model.pools and model.weights == plain.weights and model.key() != plain.key()
    assert json.loads(model.reading()) == {"token_head": "colbert_linear.pt"} and plain.reading() == ""
    assert model.key() != load_bi(m3(tmp_path / "other", outs=8), device="cpu").key()
    lengths = torch.tensor([10])
    assert model.flops(lengths, Detail.TOKENS) == model.flops(lengths, Detail.POOLED) + 2 * 10 * 16 * WIDTH
    assert Reranker(model, "fast").score(QUERIES["q1"], DOCS).order == Reranker(plain, "fast").score(QUERIES["q1"], DOCS).order


def test_what_does_not_go_with_a_head_is_refused(tmp_path: Path) -> None:
    folder = m3(tmp_path / "m3")
    save_file({"V": torch.eye(WIDTH, 8)}, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="takes no subspace: it has a head of its own"):
        load_bi(folder, device="cpu", subspace=tmp_path / "v.safetensors")
    torch.save({"weight": torch.randn(4, 7)}, folder / "colbert_linear.pt")
    with pytest.raises(UserError, match=r"colbert_linear\.pt is no linear map of 32 components"):
        load_bi(folder, device="cpu")
    (folder / "colbert_linear.pt").write_text("nothing")
    with pytest.raises(UserError, match=r"colbert_linear\.pt is no linear map"):
        load_bi(folder, device="cpu")
