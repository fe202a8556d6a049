"""A sparse encoder weighs words as sentence-transformers' SparseEncoder does, or is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder

from rerank_lab.errors import ModelError, UserError
from rerank_lab.models import sparse
from rerank_lab.models.base import SparseVectors
from rerank_lab.models.kinds import described, load_bi_encoder, load_cross_encoder
from rerank_lab.models.kinds import load_sparse_encoder as load
from tests.conftest import DOCUMENTS, QUERIES, ROOT
from tests.models.checkpoints import BASE, Make, bi_encoder, change, modules, put, splade, transformer

sys.path.insert(0, str(ROOT / "experiments" / "references"))
import sparse_encoder as reference_scores

SPARSE = "sentence_transformers.sparse_encoder."
LONG = " ".join(text for _, text in DOCUMENTS.values()) * 4
TEXTS = [*(text for _, text in DOCUMENTS.values()), "", "naïve 你好 [SEP]", LONG]
ASKED = [*QUERIES.values(), LONG[:900]]


def fill_mask(folder: Path) -> Path:
    """The layout of sentence-transformers 6."""
    kinds = modules(BASE + "transformer.Transformer", SPARSE + "modules.splade_pooling.SpladePooling")
    text = {"text": {"method": "forward", "method_output_name": "logits"}}
    task = {"transformer_task": "fill-mask", "modality_config": text, "module_output_name": "token_embeddings"}
    return put(splade(folder), {"modules.json": kinds, "sentence_bert_config.json": {"max_seq_length": 40} | task})


LIKE_REFERENCE: dict[str, Make] = {
    "the maximum": splade,
    "the sum": lambda f: splade(f, pooling_strategy="sum"),
    "two logarithms": lambda f: splade(f, activation_function="log1p_relu"),
    "prompts": lambda f: splade(f, about={"prompts": {"query": "query: ", "document": "text: "}, "default_prompt_name": None}),
    "the heaviest words": lambda f: splade(f, about={"max_active_dims": 40}),
    "as sentence-transformers 6 saves it": fill_mask,
    "a bare masked language model": lambda f: transformer(f, "BertForMaskedLM"),
    "DistilBERT": lambda f: splade(f, "DistilBertForMaskedLM"),
    "RoBERTa": lambda f: splade(f, "RobertaForMaskedLM", limit=100),
    "ModernBERT": lambda f: splade(f, "ModernBertForMaskedLM"),
    "truncation from the left": lambda f: change(splade(f), "tokenizer_config.json", truncation_side="left"),
}


def dense(vectors: SparseVectors, width: int) -> torch.Tensor:
    made = torch.zeros(len(vectors), width)
    for i, (a, b) in enumerate(zip(vectors.ends[:-1], vectors.ends[1:])):
        made[i, torch.from_numpy(vectors.words[a:b]).long()] = torch.from_numpy(vectors.weights[a:b])
    return made


@pytest.mark.parametrize("layout", LIKE_REFERENCE)
def test_words_are_weighed_as_sparse_encoder_does(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LIKE_REFERENCE[layout](tmp_path)
    model, reference = load(folder, device="cpu"), SparseEncoder(str(folder), device="cpu")
    monkeypatch.setitem(sparse.HEAD_TOKENS, "cpu", 7)  # less than a text has
    for texts, kind, encode in ((ASKED, "query", reference.encode_query), (TEXTS, "document", reference.encode_document)):
        wanted, found = encode(texts, batch_size=1, convert_to_sparse_tensor=False), model.encode(texts, kind)
        assert isinstance(wanted, torch.Tensor) and 10 < (wanted > 0).sum(1).max()
        torch.testing.assert_close(dense(found, wanted.shape[1]), wanted, atol=1e-5, rtol=1e-5)
        assert found.weights.min() > 0 and found.weights.dtype == np.float32
    query, documents = (dense(model.encode(texts, kind), 30522).double() for texts, kind in (([ASKED[0]], "query"), (TEXTS, "document")))
    assert (documents @ query[0]).tolist() == pytest.approx(reference_scores.scores(folder, ASKED[0], TEXTS), rel=1e-6, abs=1e-4)


def test_a_batch_changes_nothing_and_texts_can_be_taken(tmp_path: Path) -> None:
    model = load(splade(tmp_path), device="cpu")
    together, alone = model.encode(TEXTS, "document"), SparseVectors.join(model.encode([text], "document") for text in TEXTS)
    torch.testing.assert_close(dense(together, 30522), dense(alone, 30522), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense(together.taken(np.array([3, 0, 3])), 30522), dense(together, 30522)[[3, 0, 3]])
    assert len(SparseVectors.join([])) == 0 and len(model.encode([], "query")) == 0


def test_a_reading_tells_what_is_not_usual(tmp_path: Path) -> None:
    assert load(splade(tmp_path / "a"), device="cpu").checkpoint.reading() == ""
    made = splade(tmp_path / "b", pooling_strategy="sum", activation_function="log1p_relu", about={"max_active_dims": 9, "prompts": {"passage": "p: "}})
    checkpoint = load(made, device="cpu").checkpoint
    assert checkpoint.reading() == '{"pooling": "sum", "activation": "log1p_relu", "max_active": 9}'
    assert "prompts called passage are not used" in checkpoint.notes[0]


REFUSED: dict[str, tuple[Make, str]] = {
    "a bi-encoder": (lambda f: bi_encoder(f, "Normalize"), "is a bi-encoder (BertModel), and a sparse encoder is needed here; give it as --model"),
    "a causal model": (lambda f: transformer(f, "Qwen3ForCausalLM"), "is a causal language model"),
    "a Router": (
        lambda f: put(splade(f), {"modules.json": modules("Router", SPARSE + "models.SpladePooling")}),
        "not Router, SpladePooling; Router: queries and documents go through modules of their own",
    ),
    "an autoencoder": (
        lambda f: put(splade(f), {"modules.json": modules("Transformer", "Pooling", SPARSE + "models.SparseAutoEncoder")}),
        "SparseAutoEncoder: it makes a dense vector sparse",
    ),
    "a Transformer that pools": (lambda f: put(splade(f), {"modules.json": modules("Transformer", SPARSE + "models.SpladePooling")}), "runs its transformer for feature-extraction"),
    "another similarity": (lambda f: splade(f, about={"similarity_fn_name": "cosine"}), "compares by cosine"),
    "a key": (lambda f: splade(f, about={"mine": 1}), "config_sentence_transformers.json has mine"),
    "no number of words": (lambda f: splade(f, about={"max_active_dims": "all"}), "max_active_dims in config_sentence_transformers.json must be a whole number"),
    "another strategy": (lambda f: splade(f, pooling_strategy="mean"), "pools by mean of relu; known are max and sum"),
    "a pooling key": (lambda f: splade(f, temperature=2), "1_SpladePooling/config.json has temperature"),
    "no pooling": (lambda f: put(splade(f), {"1_SpladePooling/config.json": None}), "is missing, which says how words are weighed"),
    "no modules.json": (lambda f: change(put(splade(f), {"modules.json": None}), "config.json", architectures=["BertModel"]), "has no modules.json that says how it weighs words"),
    "leftovers": (lambda f: put(transformer(f, "BertForMaskedLM"), {"sentence_bert_config.json": {}}), "has sentence_bert_config.json but no modules.json"),
    "own code": (lambda f: change(splade(f), "config.json", auto_map={"AutoModel": "modeling.Mine"}), "brings code of its own"),
    "LoRA": (lambda f: put(splade(f), {"adapter_config.json": {}}), "is a LoRA adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sparse_encoder_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        load(make(tmp_path), device="cpu")
    assert message in str(refused.value)


@pytest.mark.parametrize("load_other", [load_bi_encoder, load_cross_encoder])
def test_as_another_model_it_is_refused_with_the_option_that_takes_it(load_other: object, tmp_path: Path) -> None:
    assert callable(load_other)
    with pytest.raises(UserError, match=r"is a sparse encoder .*; give it as --candidates splade:MODEL"):
        load_other(str(splade(tmp_path)), device="cpu")


def test_a_head_that_reads_more_than_states_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse._Head, "__call__", lambda self, h: h)
    with pytest.raises(UserError, match="a BertForMaskedLM does not make its logits of hidden states alone"):
        load(splade(tmp_path), device="cpu")


def test_a_weight_of_nan_is_a_failure_of_the_model(tmp_path: Path) -> None:
    folder = splade(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.bias"][5] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="gave a NaN or infinite weight"):
        load(folder, device="cpu").encode(["join"], "query")


def test_a_bare_language_model_is_read_with_a_note(tmp_path: Path) -> None:
    assert "is read as SPLADE" in described(str(transformer(tmp_path, "BertForMaskedLM")))["notes"]
