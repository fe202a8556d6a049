"""`--list MODEL` says what a model is, and refuses what loading refuses, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rerank_lab.errors import UserError
from rerank_lab.models.base import AS_IT_IS, Overrides
from rerank_lab.models.kinds import described, load_bi_encoder, load_cross_encoder
from tests.models.checkpoints import bi_encoder, change, cross_encoder, late_interaction, splade, stanford, static, transformer
from tests.models.decoders import ROLES, chat_classifier, logit_score

Make = Callable[[Path], Path]
ENCODER, SCORER = load_bi_encoder, load_cross_encoder
NO_PLACE = ROLES.replace("system", "developer")


def broken(**config: Any) -> Make:
    return lambda folder: change(bi_encoder(folder), "config.json", **config)


def without(make: Make, *files: str) -> Make:
    def made(folder: Path) -> Path:
        make(folder)
        for path in [path for path in folder.rglob("*") if path.name in files]:
            path.unlink()
        return folder

    return made


TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize(
    ("make", "load", "asked"),
    [
        (broken(model_type="foobar"), ENCODER, AS_IT_IS),
        (broken(model_type=[]), ENCODER, AS_IT_IS),
        (broken(num_hidden_layers="x"), ENCODER, AS_IT_IS),
        (broken(hidden_size=-1), ENCODER, AS_IT_IS),
        (without(bi_encoder, *TOKENIZER), ENCODER, AS_IT_IS),
        (without(static, *TOKENIZER), ENCODER, AS_IT_IS),
        (lambda folder: transformer(folder, "BertForPreTraining"), ENCODER, AS_IT_IS),
        (lambda folder: transformer(folder, "BertForSequenceClassification", num_labels=3), SCORER, AS_IT_IS),
        (lambda folder: chat_classifier(folder, "{{ messages[0].content }}"), SCORER, AS_IT_IS),
        (lambda folder: chat_classifier(folder, NO_PLACE), SCORER, Overrides(instruction="x")),
        (lambda folder: logit_score(folder, chat=NO_PLACE), SCORER, Overrides(instruction="x")),
        (cross_encoder, SCORER, Overrides(instruction="x")),
        (late_interaction, ENCODER, Overrides(truncate_dim=8)),
        (late_interaction, ENCODER, Overrides(instruction="x")),
        (lambda folder: late_interaction(folder, about={"query_length": 600}), ENCODER, AS_IT_IS),
    ],
)
def test_what_loading_refuses_is_refused_in_the_same_words(make: Make, load: Any, asked: Overrides, tmp_path: Path) -> None:
    folder = str(make(tmp_path / "model"))
    with pytest.raises(UserError) as loading:
        load(folder, device="cpu", overrides=asked)
    with pytest.raises(UserError) as listing:
        described(folder, asked)
    assert str(listing.value) == str(loading.value)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("nope.safetensors", AS_IT_IS, "no file"),
        ("minilm-cross", Overrides(instruction="x"), "takes no instruction"),
    ],
)
def test_a_one_way_adapter_that_does_not_load_is_refused(name: str, asked: Overrides, message: str) -> None:
    for call in (lambda: described(name, asked), lambda: load_cross_encoder(name, device="cpu", overrides=asked)):
        with pytest.raises(UserError, match=message):
            call()


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("text")
    with pytest.raises(UserError, match="is no safetensors file"):
        described(str(file))
    with pytest.raises(UserError, match="was trained on other weights"):
        described(str(bi_encoder(tmp_path / "model") / "model.safetensors"))


def test_a_sparse_encoder_takes_nothing(tmp_path: Path) -> None:
    folder = str(splade(tmp_path / "model"))
    assert described(folder)["give it as"].startswith("--candidates")
    for asked in (Overrides(query_prompt="q: "), Overrides(truncate_dim=8), Overrides(instruction="x")):
        with pytest.raises(UserError, match="which is read as its folder says"):
            described(folder, asked)


def test_a_chat_template_is_said(tmp_path: Path) -> None:
    for folder in (chat_classifier(tmp_path / "a"), logit_score(tmp_path / "b")):
        asked = Overrides(instruction="Rank.")
        said, model = described(str(folder), asked), load_cross_encoder(folder, device="cpu", overrides=asked)
        assert said["prompt"] == "its own chat template" and said["instruction"] == "'Rank.'"
        assert said["reads"].startswith(f"{model.limit} tokens of query and document together")


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (late_interaction, AS_IT_IS),
        (late_interaction, Overrides(query_prompt="q: ", document_prompt="p: ")),
        (lambda folder: late_interaction(folder, about={"document_prefix": None}), Overrides(document_prompt="p: ")),
        (lambda folder: late_interaction(folder, about={"query_prefix": None, "document_prefix": None}), Overrides(query_prompt="q: ")),
        (lambda folder: stanford(folder, {"doc_maxlen": None}), AS_IT_IS),
        (lambda folder: stanford(folder, {"doc_maxlen": 99999}), Overrides(query_prompt="q: ")),
    ],
)
def test_prompts_and_limits_of_late_interaction_are_those_of_the_loaded_model(make: Make, asked: Overrides, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    said, model = described(str(folder), asked), load_bi_encoder(folder, device="cpu", overrides=asked)
    assert (said["query prompt"], said["document prompt"]) == tuple(repr(text) if (text := model.prompt(kind)) else "none" for kind in ("query", "document"))
    query, document = (model.sides[kind] for kind in ("query", "document"))  # type: ignore[attr-defined]
    assert said["reads"].startswith(f"{query.limit} tokens of a query and {document.limit} of a document, ")
    assert f"{query.filled} tokens" in said["reads"]
