"""Cross-encoders made of modules, and classifiers that read through a chat template, give the logits of sentence_transformers.CrossEncoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rerank_lab.errors import UserError
from rerank_lab.models.base import Inputs, Overrides
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.cross_modules import ModularCrossEncoder
from rerank_lab.models.forward import encoder_flops
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from rerank_lab.models.packed import Packed
from tests.conftest import DOCUMENTS, ROOT, load_pairs
from tests.models.checkpoints import BASE, WIDTH, Make, change, modules, put, transformer
from tests.models.decoders import CHAT, NO_SYSTEM, chat_classifier, decoder, texts

sys.path.insert(0, str(ROOT / "experiments" / "references"))
import cross_encoder as sentence_transformers_says

QUERY = "sort the rows of an array by a column"
TEXTS = [*(text for _, text in DOCUMENTS.values()), "", "naïve 你好 [SEP] x", " ".join(texts())[:4000]]
TYPES = {
    "Transformer": BASE + "transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": BASE + "dense.Dense",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "Normalize": BASE + "normalize.Normalize",
}


def modular(folder: Path, *after: str, pooling: str = "cls", architecture: str = "BertModel", about: dict[str, Any] | None = None, **config: Any) -> Path:
    """A cross-encoder of a Transformer, a Pooling and these modules, the last of which is a Dense that makes a score."""
    kinds = ["Transformer", "Pooling", *after]
    transformer(folder, architecture, **config)
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    put(
        folder,
        {
            "modules.json": modules(*(TYPES[kind] for kind in kinds)),
            "sentence_bert_config.json": {"transformer_task": "feature-extraction", "modality_config": text, "module_output_name": "token_embeddings"},
            "1_Pooling/config.json": {"embedding_dimension": WIDTH, "pooling_mode": pooling, "include_prompt": True},
            "config_sentence_transformers.json": {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"} | (about or {}),
        },
    )
    for n, kind in enumerate(after, 2):
        g, place = torch.Generator().manual_seed(n), folder / f"{n}_{kind}"
        last = n == len(kinds) - 1
        size = 1 if last else WIDTH
        if kind == "Dense":
            act = "linear.Identity" if last else "activation.GELU"
            names = {"module_input_name": "sentence_embedding", "module_output_name": "scores" if last else "sentence_embedding"}
            settings = {"in_features": WIDTH, "out_features": size, "bias": last, "activation_function": f"torch.nn.modules.{act}"}
            put(folder, {f"{n}_Dense/config.json": settings | names})
            weights = {"linear.weight": torch.randn(size, WIDTH, generator=g) * WIDTH**-0.5}
            save_file(weights | ({"linear.bias": torch.randn(1, generator=g)} if last else {}), place / "model.safetensors")
        elif kind == "LayerNorm":
            put(folder, {f"{n}_LayerNorm/config.json": {"dimension": WIDTH}})
            save_file({"norm.weight": torch.rand(WIDTH, generator=g) + 0.5, "norm.bias": torch.randn(WIDTH, generator=g) * 0.1}, place / "model.safetensors")
        else:
            put(folder, {f"{n}_Normalize/config.json": {}})
    return folder


LIKE_REFERENCE: dict[str, Make] = {
    "Ettin": lambda f: modular(f, "Dense", "LayerNorm", "Dense", architecture="ModernBertModel", bos_token_id=101, eos_token_id=102, cls_token_id=101, sep_token_id=102, pad_token_id=0),
    "one Dense on a mean": lambda f: modular(f, "Dense", pooling="mean"),
    "the greatest of all tokens": lambda f: modular(f, "Dense", pooling="max"),
    "the last token": lambda f: modular(f, "LayerNorm", "Dense", pooling="lasttoken"),
    "unit vectors": lambda f: modular(f, "Normalize", "Dense"),
    "a default prompt and a limit": lambda f: change(
        modular(f, "Dense", about={"prompts": {"query": "Find what answers: "}, "default_prompt_name": "query"}), "sentence_bert_config.json", max_seq_length=40),
    "a classifier with a chat template": chat_classifier,
    "a classifier with a chat template and a limit": lambda f: chat_classifier(f, max_seq_length=150),
    "a classifier without a padding token in its configuration": lambda f: change(
        decoder(f, "Qwen3ForSequenceClassification", None, num_labels=1), "config.json", pad_token_id=None),
}  # fmt: skip


@pytest.mark.parametrize("layout", LIKE_REFERENCE)
def test_logits_are_sentence_transformers(layout: str, tmp_path: Path) -> None:
    folder = LIKE_REFERENCE[layout](tmp_path)
    model = load_pairs(folder, device="cpu")
    logits, _, cut = model.score(QUERY, TEXTS, max_tokens=10**9)
    wanted = torch.tensor(sentence_transformers_says.scores(folder, QUERY, TEXTS))
    assert wanted.std() > 0.01
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert isinstance(model, ModularCrossEncoder) == (model.checkpoint.root / "1_Pooling").is_dir()
    assert bool(cut[-1]) == (len(model.tokenizer.encode(TEXTS[-1])) > model.limit)
    alone = torch.cat([model.score(QUERY, [text], max_tokens=10**9)[0] for text in TEXTS])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


def test_a_first_token_alone_is_computed_where_no_other_is_pooled(tmp_path: Path) -> None:
    first, mean = (load_pairs(modular(tmp_path / mode, "Dense", pooling=mode), device="cpu") for mode in ("cls", "mean"))
    assert isinstance(first.network, Packed)
    work = first.work(Inputs(QUERY, TEXTS, 512))
    lengths = torch.tensor([pair.size for pair in work])
    assert first.flops(work) == encoder_flops(first.config, lengths, first=True) < mean.flops(work) == encoder_flops(mean.config, lengths)


def test_max_tokens_cuts_the_documents_text_before_a_chat_template(tmp_path: Path) -> None:
    folder = chat_classifier(tmp_path)
    model, text = load_pairs(folder, device="cpu"), TEXTS[-1]
    kept = text[: model.tokenizer.encode(text, add_special_tokens=False).offsets[49][1]]
    logits, lengths, cut = model.score(QUERY, [text, "x"], max_tokens=50)
    torch.testing.assert_close(logits, torch.tensor(sentence_transformers_says.scores(folder, QUERY, [kept, "x"])), atol=1e-4, rtol=0)
    assert cut.tolist() == [True, False] and lengths[0] > lengths[1] > 20


def test_an_instruction_takes_the_place_of_the_default_prompt(tmp_path: Path) -> None:
    prompt = {"prompts": {"query": "Find what answers: "}, "default_prompt_name": "query"}
    for folder in (chat_classifier(tmp_path / "chat"), modular(tmp_path / "modules", "Dense", about=prompt)):
        told = load_cross_encoder(folder, device="cpu", overrides=Overrides(instruction="Find code: "))
        own = load_cross_encoder(folder, device="cpu")
        assert isinstance(told, CrossEncoder) and isinstance(own, CrossEncoder)
        wanted = torch.tensor(sentence_transformers_says.scores(folder, QUERY, TEXTS, "Find code: "))
        torch.testing.assert_close(told.score(QUERY, TEXTS, max_tokens=10**9)[0], wanted, atol=1e-4, rtol=0)
        assert told.fingerprint != own.fingerprint and "Find code: " in told.reading()
    for folder in (modular(tmp_path / "none", "Dense"), chat_classifier(tmp_path / "fixed", NO_SYSTEM)):
        with pytest.raises(UserError, match="takes no instruction"):
            load_cross_encoder(folder, device="cpu", overrides=Overrides(instruction="Find code: "))


REFUSED: dict[str, tuple[Make, str]] = {
    "two scores": (lambda f: change(modular(f, "Dense"), "2_Dense/config.json", out_features=2), "has 2 labels; a cross-encoder for reranking has one"),
    "no score": (lambda f: change(modular(f, "Dense"), "2_Dense/config.json", module_output_name="sentence_embedding"), "2_Dense maps sentence_embedding to sentence_embedding"),
    "a residual": (lambda f: change(modular(f, "Dense", "Dense"), "2_Dense/config.json", use_residual=True), "or has a residual, which is not known"),
    "another end": (lambda f: modular(f, "Dense", "LayerNorm"), "with a Dense as the last are known, not Transformer, Pooling, Dense, LayerNorm"),
    "another package": (lambda f: put(modular(f, "Dense"), {"modules.json": modules(TYPES["Transformer"], "mine.Pooling", TYPES["Dense"])}), "are known, not mine.Pooling"),
    "another pooling": (lambda f: modular(f, "Dense", pooling="attention"), "pools by attention"),
    "another activation": (lambda f: change(modular(f, "Dense", "Dense"), "2_Dense/config.json", activation_function="mine.Tanh"), "activation mine.Tanh (mine.Tanh) of its Dense"),
    "a key that is not known": (lambda f: change(modular(f, "LayerNorm", "Dense"), "2_LayerNorm/config.json", eps=1), "2_LayerNorm/config.json has eps"),
    "no weights": (lambda f: put(modular(f, "LayerNorm", "Dense"), {"2_LayerNorm/model.safetensors": None}), "is no whole LayerNorm module"),
    "a prompt that is not pooled": (
        lambda f: change(modular(f, "Dense", about={"prompts": {"query": "q: "}, "default_prompt_name": "query"}), "1_Pooling/config.json", include_prompt=False),
        "leaves its prompt out of the pooling"),
    "a chat template of no pair": (lambda f: chat_classifier(f, CHAT), "its chat template has no place for query and document"),
    "a bare classifier with such a template": (lambda f: decoder(f, "Qwen3ForSequenceClassification", num_labels=1), "its chat template has no place for query and document"),
    "two labels": (lambda f: decoder(f, "Qwen2ForSequenceClassification", None, num_labels=2), "has 2 labels; a cross-encoder for reranking has one"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        load_cross_encoder(make(tmp_path), device="cpu")
    assert message in str(refused.value) and len(str(refused.value)) < 500


def test_the_other_role_is_refused_by_name(tmp_path: Path) -> None:
    for folder in (modular(tmp_path / "a", "Dense"), chat_classifier(tmp_path / "b")):
        with pytest.raises(UserError, match="and a bi-encoder is needed here; give it as --model-cross"):
            load_bi_encoder(folder, device="cpu")
