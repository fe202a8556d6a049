"""A checkpoint is scored as sentence-transformers does, or refused by a message that says what it is and what to do."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder as CrossReference
from sentence_transformers import SentenceTransformer
from torch import Tensor

from rerank_lab import Reranker
from rerank_lab.cache.vectors import text_key
from rerank_lab.engine import EngineSpec
from rerank_lab.errors import ModelError, UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.models.base import Detail, Overrides
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.kinds import load_cross_encoder
from tests.conftest import DOCUMENTS, QUERIES, load_bi
from tests.models.checkpoints import BASE, TOKENIZER, WIDTH, Make, bi_encoder, change, cross_encoder, modules, put, st_about, transformer

LONG = " ".join(text for _, text in DOCUMENTS.values()) * 12
TEXTS = [*(text for _, text in DOCUMENTS.values()), "", "ΑΣ ΟΔΟΣ İ", LONG]
ASKED = [*QUERIES.values(), LONG[:900]]


def assert_bi_is_reference(folder: Path) -> BiEncoder:
    """Vectors of queries and documents, and their similarity, equal those of sentence-transformers."""
    reference, model = SentenceTransformer(str(folder), device="cpu"), load_bi(str(folder), device="cpu")
    wanted = [reference.encode_query(ASKED, batch_size=1, convert_to_tensor=True), reference.encode_document(TEXTS, batch_size=1, convert_to_tensor=True)]
    found = [model.encode(texts, kind=kind, max_tokens=9999, detail=Detail.POOLED).pooled for texts, kind in ((ASKED, "query"), (TEXTS, "document"))]
    for a, b in zip(found, wanted):
        assert b.std(0).max() > 0.01, "texts differ"
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    fast = Reranker(model, "fast", max_tokens_per_doc=9999)
    for query, row in zip(ASKED, reference.similarity(*wanted)):
        ranking = fast.score(query, TEXTS)
        torch.testing.assert_close(ranking.scores, row[ranking.order], atol=1e-4, rtol=1e-5)
    return model


def assert_cross_is_reference(folder: Path) -> CrossEncoder:
    """Logits equal those of sentence-transformers."""
    reference, model = CrossReference(str(folder), device="cpu"), load_cross_encoder(str(folder), device="cpu")
    assert isinstance(model, CrossEncoder)
    for query in ASKED:
        wanted = reference.predict([(query, text) for text in TEXTS], batch_size=1, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
        assert wanted.std() > 0.01, "documents differ"
        torch.testing.assert_close(model.score(query, TEXTS, max_tokens=9999)[0], wanted, atol=1e-5, rtol=1e-5)
    return model


def with_prompts(**prompts: str) -> Make:
    return lambda folder: bi_encoder(folder, "Normalize", about=st_about(prompts=prompts, default_prompt_name=None))


def pooling(mode: str, **keys: Any) -> Make:
    """A bi-encoder that pools in this way, with prompts."""
    made = with_prompts(query="Represent the question: ", document="text: ")
    return lambda folder: put(made(folder), {"1_Pooling/config.json": {"embedding_dimension": WIDTH, "pooling_mode": mode, **keys}})


def lower_casing(folder: Path, *kinds: str) -> Path:
    change(folder, "tokenizer_config.json", do_lower_case=False)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace('"lowercase": true', '"lowercase": false').replace('"lowercase":true', '"lowercase":false'))
    return folder


BI_LIKE_REFERENCE: dict[str, Make] = {
    "prompts query and passage": with_prompts(query="query: ", passage="passage: "),
    "an empty document prompt beside passage": with_prompts(query="query: ", document="", passage="passage: "),
    "prompts query and document": with_prompts(query="find: ", document="text: "),
    "weighted mean": pooling("weightedmean"),
    "mean over the root of the length": pooling("mean_sqrt_len_tokens"),
    **{f"prompts left out of the pooling, {mode}": pooling(mode, include_prompt=False) for mode in ("mean", "cls", "max", "lasttoken", "weightedmean")},
    "LayerNorm and Dropout": lambda f: bi_encoder(f, "LayerNorm", "Dropout", "Normalize"),
    "an encoder of T5": lambda f: bi_encoder(f, "Dense", "Normalize", architecture="T5EncoderModel"),
    "a bare encoder of T5": lambda f: transformer(f, "T5EncoderModel"),
    "default_prompt_name": lambda f: bi_encoder(f, "Normalize", about=st_about(prompts={"mine": "Represent: "}, default_prompt_name="mine")),
    "Normalize before Dense": lambda f: bi_encoder(f, "Normalize", "Dense"),
    "Dense, Normalize, Dense's own length": lambda f: bi_encoder(f, "Dense", "Normalize"),
    "module types of sentence-transformers 6": lambda f: put(
        bi_encoder(f, "Normalize"),
        {
            "modules.json": modules(
                BASE + "transformer.Transformer", "sentence_transformers.sentence_transformer.modules.pooling.Pooling", BASE + "normalize.Normalize"
            )
        },
    ),
    "truncate_dim": lambda f: bi_encoder(f, "Normalize", about=st_about(truncate_dim=16)),
    "truncate_dim past the width": lambda f: bi_encoder(f, about=st_about(truncate_dim=999)),
    "truncate_dim of a dot product": lambda f: bi_encoder(f, about=st_about(truncate_dim=8, similarity_fn_name="dot")),
    "dot": lambda f: bi_encoder(f, about=st_about(similarity_fn_name="dot")),
    "settings in sentence_roberta_config.json": lambda f: put(
        bi_encoder(f, "Normalize"), {"sentence_bert_config.json": None, "sentence_roberta_config.json": {"max_seq_length": 9, "do_lower_case": False}}
    ),
    "do_lower_case": lambda f: change(lower_casing(bi_encoder(f, "Normalize")), "sentence_bert_config.json", do_lower_case=True),
    "truncation from the left": lambda f: change(bi_encoder(f, "Normalize"), "tokenizer_config.json", truncation_side="left"),
    "MPNet, text past its positions": lambda f: put(
        change(bi_encoder(f, "Normalize", architecture="MPNetModel", max_position_embeddings=66), "tokenizer_config.json", model_max_length=64),
        {"sentence_bert_config.json": {"max_seq_length": 64}},
    ),
    "a limit above the tokenizer's, which it replaces": lambda f: change(bi_encoder(f, "Normalize", limit=300), "tokenizer_config.json", model_max_length=20),
    "a language model's head in the file": lambda f: bi_encoder(f, "Normalize", architecture="BertForMaskedLM"),
    "a causal transformer that says how to pool": lambda f: put(
        bi_encoder(f, "Normalize", architecture="Qwen3ForCausalLM"), {"1_Pooling/config.json": {"embedding_dimension": WIDTH, "pooling_mode": "lasttoken"}}
    ),
}


@pytest.mark.parametrize("layout", BI_LIKE_REFERENCE)
def test_vectors_and_similarity_are_sentence_transformers(layout: str, tmp_path: Path) -> None:
    assert_bi_is_reference(BI_LIKE_REFERENCE[layout](tmp_path))


@pytest.mark.parametrize("layout", ["truncate_dim", "dot", "prompts left out of the pooling, mean", "prompts query and document"])
def test_what_is_asked_for_is_what_sentence_transformers_gives_if_asked(layout: str, tmp_path: Path) -> None:
    folder, asked = BI_LIKE_REFERENCE[layout](tmp_path), Overrides("Find: ", "", 12)
    reference, model = SentenceTransformer(str(folder), device="cpu", truncate_dim=12), load_bi(str(folder), device="cpu", overrides=asked)
    assert model.dimensions == 12 and (model.prompt("query"), model.prompt("document")) == ("Find: ", "")
    wanted = [reference.encode(texts, prompt=prompt, batch_size=1, convert_to_tensor=True) for texts, prompt in ((ASKED, "Find: "), (TEXTS, ""))]
    for a, texts, kind in zip(wanted, (ASKED, TEXTS), ("query", "document")):
        torch.testing.assert_close(model.encode(texts, kind=kind, max_tokens=9999, detail=Detail.POOLED).pooled, a, atol=1e-5, rtol=1e-5)
    fast = Reranker(model, "fast", max_tokens_per_doc=9999)
    for query, row in zip(ASKED, reference.similarity(*wanted)):
        ranking = fast.score(query, TEXTS)
        torch.testing.assert_close(ranking.scores, row[ranking.order], atol=1e-4, rtol=1e-5)


def test_a_prompt_that_is_asked_for_has_vectors_of_its_own_in_the_cache(tmp_path: Path) -> None:
    folder = with_prompts(query="query: ", document="")(tmp_path / "m")

    def pooled(query_prompt: str | None, **asked: Any) -> tuple[str, Tensor]:
        spec = EngineSpec(str(folder), device="cpu", cache_dir=str(tmp_path / "cache"), query_prompt=query_prompt, **asked)
        reranker = Reranker.of(spec.load(), "fast")
        assert reranker.encoder is not None
        return reranker.encoder.key(), reranker.pooled(["how to sort"], kind="query")

    (key, own), (same_key, again), (also, other), (_, none) = pooled(None), pooled("query: "), pooled("find: "), pooled("")
    assert key == same_key == also, "documents stay as they are"
    assert torch.equal(own, again)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in ((own, other), (own, none), (other, none)))
    assert pooled(None, document_prompt="text: ")[0] != key and pooled(None, truncate_dim=8)[0] != key
    asked = load_bi(str(folder), device="cpu", overrides=Overrides(query_prompt="find: "))
    alone = asked.encode(["how to sort"], kind="query", detail=Detail.POOLED).pooled
    assert torch.equal(other, alone)
    assert text_key("x", 9, "query") == hashlib.blake2b(b"query\x009\x00x", digest_size=16).digest() != text_key("x", 9, "query", "find: ")


CROSS_LIKE_REFERENCE: dict[str, Make] = {
    "max_seq_length": lambda f: cross_encoder(f, about={}, max_seq_length=40),
    "a limit above the tokenizer's": lambda f: change(cross_encoder(f, about={}, max_seq_length=200), "tokenizer_config.json", model_max_length=30),
    "a default prompt": lambda f: cross_encoder(f, about={"prompts": {"query": "Find what answers: "}, "default_prompt_name": "query"}),
    "a default prompt under another name": lambda f: cross_encoder(f, about={"prompts": {"mine": "Is it: "}, "default_prompt_name": "mine"}, max_seq_length=64),
    "a prompt that is not the default": lambda f: cross_encoder(f, about={"prompts": {"query": "Find what answers: "}, "default_prompt_name": None}),
    "a chat template that modality_config leaves out": lambda f: put(cross_encoder(f, about={}), {"chat_template.jinja": "{{ messages[0].content }}"}),
    "a chat template without modules.json": lambda f: put(cross_encoder(f), {"chat_template.jinja": "{{ messages }}"}),
    "a chat template in the tokenizer": lambda f: change(cross_encoder(f), "tokenizer_config.json", chat_template="{{ messages }}"),
    "do_lower_case": lambda f: lower_casing(cross_encoder(f, about={}, do_lower_case=True)),
    "truncation from the left": lambda f: change(cross_encoder(f), "tokenizer_config.json", truncation_side="left"),
    "a decoder without a padding token in its configuration": lambda f: change(
        cross_encoder(f, "Qwen3ForSequenceClassification"), "config.json", pad_token_id=None
    ),
    "a pooler that the architecture has no use for": lambda f: add_pooler(cross_encoder(f, "XLMRobertaForSequenceClassification", max_position_embeddings=514)),
}


def add_pooler(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors") | {
        "roberta.pooler.dense.weight": torch.ones(WIDTH, WIDTH),
        "roberta.pooler.dense.bias": torch.ones(WIDTH),
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", CROSS_LIKE_REFERENCE)
def test_logits_are_sentence_transformers(layout: str, tmp_path: Path) -> None:
    assert_cross_is_reference(CROSS_LIKE_REFERENCE[layout](tmp_path))


@pytest.mark.parametrize(("architecture", "places"), [("MPNetModel", 66), ("LongformerModel", 66)])
def test_positions_bound_a_text_where_the_tokenizer_does_not(architecture: str, places: int, tmp_path: Path) -> None:
    more = {"attention_window": [8, 8], "pad_token_id": 1} if architecture == "LongformerModel" else {"pad_token_id": 1}
    folder = bi_encoder(tmp_path, "Normalize", architecture=architecture, max_position_embeddings=places, **more)
    put(folder, {"sentence_bert_config.json": None})
    change(folder, "tokenizer_config.json", model_max_length=None)
    model = load_bi(str(folder), device="cpu")
    assert model.limit == places - 2 - model.specials
    assert bool(model.encode([LONG], detail=Detail.POOLED).pooled.isfinite().all())
    with pytest.raises(IndexError):  # one token more has no position, so the limit is as high as possible
        model.limit += 1
        model.encode([LONG], detail=Detail.POOLED)


READS_PADDING: dict[str, dict[str, Any]] = {
    "MobileBertModel": {"embedding_size": WIDTH, "intra_bottleneck_size": WIDTH, "true_hidden_size": WIDTH, "normalization_type": "layer_norm"},
    "ConvBertModel": {"embedding_size": WIDTH},
    "FNetModel": {"type_vocab_size": 4},
    "ElectraModel": {"embedding_size": WIDTH},
}


@pytest.mark.parametrize("architecture", READS_PADDING)
def test_a_texts_vector_is_its_own_whatever_shares_its_batch(architecture: str, tmp_path: Path) -> None:
    """Some models read padding. Only texts of equal length share their batches."""
    model = load_bi(str(bi_encoder(tmp_path, "Normalize", architecture=architecture, limit=200, **READS_PADDING[architecture])), device="cpu")
    assert model.network.equal_lengths == (architecture != "ElectraModel")
    together = model.encode(TEXTS, detail=Detail.POOLED).pooled
    alone = torch.cat([model.encode([text], detail=Detail.POOLED).pooled for text in TEXTS])
    assert together.std(0).max() > 0.01
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_score_read_off_the_last_place_is_not_read_off_padding(tmp_path: Path) -> None:
    model = assert_cross_is_reference(cross_encoder(tmp_path, "XLNetForSequenceClassification", d_model=WIDTH, n_layer=2, n_head=4, d_inner=48))
    assert model.network.equal_lengths


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    folder = bi_encoder(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][0] | {"id": 30522, "content": "[ENT]", "special": False}
    put(folder, {"tokenizer.json": tokenizer | {"added_tokens": [*tokenizer["added_tokens"], added]}})
    model = load_bi(str(folder), device="cpu")
    assert bool(model.encode(["join two tables"]).pooled.isfinite().all())
    with pytest.raises(ModelError, match="token number 30522, and it has embeddings for 30522: tokens were added to its tokenizer alone"):
        model.encode(["join two [ENT]"])


def test_a_tokenizers_other_files_are_part_of_the_cache_key_where_it_is_made_of_them(tmp_path: Path) -> None:
    folder = put(bi_encoder(tmp_path), {"tokenizer.json": None})
    before = load_bi(str(folder), device="cpu").key()
    words = (folder / "vocab.txt").read_text().splitlines()
    put(folder, {"vocab.txt": "\n".join([*words[:2000], *reversed(words[2000:])]) + "\n"})
    assert load_bi(str(folder), device="cpu").key() != before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: "", "is no name, an id"),
        (lambda f: str(put(f, {"file": "x"}) / "file"), "is a file; name its folder"),
        (lambda f: str(put(f, {"models--a--b/snapshots/0/config.json": {}}) / "models--a--b"), "is the hub's own folder of a model; name one of its versions"),
    ],
)
def test_places_that_are_no_checkpoint_are_told_so(make: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_bi(make(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("intfloat/e5-base-v2", "--query-prompt 'query: ' --document-prompt 'passage: '"),
        ("multilingual-e5-small-q4", "--query-prompt 'query: ' --document-prompt 'passage: '"),
        ("bge-small-en-v1.5", "--query-prompt 'Represent this sentence for searching relevant passages: '"),
        ("models--BAAI--bge-base-en/snapshots/0123", "--query-prompt 'Represent this sentence for searching relevant passages: '"),
        ("nomic_embed_text_v1.5", "--query-prompt 'search_query: ' --document-prompt 'search_document: '"),
        ("mxbai-embed-large-v1", "--query-prompt 'Represent this sentence for searching relevant passages: '"),
        ("e5-mistral-7b-instruct", "--query-prompt $'Instruct: Given a web search query, retrieve relevant passages that answer the query\\nQuery: '"),
    ],
)
def test_prompts_that_a_family_is_known_to_want_are_named(name: str, flags: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = bi_encoder(tmp_path / name, "Normalize")
    with caplog.at_level(logging.WARNING, "rerank_lab"):
        model = load_bi(str(folder), device="cpu")
    assert len(model.checkpoint.notes) == 1 and model.checkpoint.notes[0].endswith(f"were trained with some: give {flags}")
    assert model.checkpoint.notes[0] in caplog.text
    assert load_bi(str(folder), device="cpu", overrides=Overrides(query_prompt="")).checkpoint.notes == (), "none are asked for, in so many words"
    put(folder, {"config_sentence_transformers.json": {"prompts": {"query": "query: "}}})
    assert load_bi(str(folder), device="cpu").checkpoint.notes == ()


def test_a_name_that_config_json_has_kept_tells_the_family_and_others_none(tmp_path: Path) -> None:
    folder = bi_encoder(tmp_path / "mine", "Normalize")
    assert load_bi(str(folder), device="cpu").checkpoint.notes == ()
    change(folder, "config.json", _name_or_path="intfloat/e5-small")
    assert "(e5)" in load_bi(str(folder), device="cpu").checkpoint.notes[0]


def test_a_head_that_is_not_computed_is_said(tmp_path: Path) -> None:
    folder = bi_encoder(tmp_path, "Normalize")
    torch.save({}, folder / "sparse_linear.pt")
    assert load_bi(str(folder), device="cpu").checkpoint.notes == ("its head for words of a sparse search (sparse_linear.pt) is left out",)


def test_unused_prompts_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rerank_lab"):
        load_bi(str(with_prompts(query="query: ", passage="passage: ")(tmp_path)), device="cpu")
    assert "prompts called passage are not used" in caplog.text and "rename them" in caplog.text


def test_mean_pooling_of_a_bare_transformer_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rerank_lab"):
        assert_bi_is_reference(transformer(tmp_path))
    assert "no modules.json: the states of its tokens are mean-pooled" in caplog.text


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_a_text_without_a_token_has_a_vector_of_zeros(mode: str, tmp_path: Path) -> None:
    folder = put(bi_encoder(tmp_path, "Dense"), {"1_Pooling/config.json": {"pooling_mode": mode}})
    change(change(folder, "tokenizer.json", post_processor=None), "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    model = load_bi(str(folder), device="cpu")
    assert model.specials == 0
    pooled = model.encode(["join two tables", "", "sort", ""], detail=Detail.POOLED).pooled
    assert not pooled[1].any() and not pooled[3].any() and pooled[0].any()
    torch.testing.assert_close(pooled[[0, 2]], model.encode(["join two tables", "sort"], detail=Detail.POOLED).pooled)


def test_a_dot_product_reaches_first_stage_methods_and_kernel_check(tmp_path: Path, beir: Callable[..., Path]) -> None:
    folder = bi_encoder(tmp_path / "m", about=st_about(similarity_fn_name="dot"))
    arguments = ["--dataset", str(beir()), "--model", str(folder), "--model-cross", "none", "--methods", "fast,best", "--cold-queries", "0", "--no-cache"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.loads(found["models"]["model_reading"]) == {"similarity": "dot"}
    reference = SentenceTransformer(str(folder), device="cpu")
    names = list(DOCUMENTS)
    texts = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    scores = reference.similarity(reference.encode_query(list(QUERIES.values())), reference.encode_document(texts))
    wanted = {q: [names[i] for i in row.argsort(descending=True)] for q, row in zip(QUERIES, scores)}
    cosine = torch.nn.functional.normalize(torch.as_tensor(reference.encode_document(texts)), dim=1)
    other = {
        q: [names[i] for i in row.argsort(descending=True)]
        for q, row in zip(QUERIES, torch.as_tensor(reference.encode_query(list(QUERIES.values()))) @ cosine.T)
    }
    assert wanted != other, "the two similarities differ in order"
    ranked: dict[str, list[str]] = {}
    for line in (tmp_path / "out" / "runs" / "fast.trec").read_text().splitlines():
        ranked.setdefault(line.split()[0], []).append(line.split()[2])
    assert ranked == wanted
    check = next(row for row in found["rows"] if row["method"] == "fast")["vs_definition"]
    for name, bound in (("fp32", 1e-4), ("fp16", 1e-1), ("int8", 2.0)):
        assert check[name]["max_score_diff"] < bound, name


def test_vectors_of_another_reading_are_not_taken_from_an_old_cache(tmp_path: Path) -> None:
    """Earlier releases ignored these settings. The key of a folder without them has not changed."""
    news = [load_bi(str(BI_LIKE_REFERENCE[name](tmp_path / str(i))), device="cpu").checkpoint.newly_read for i, name in enumerate(
        ["prompts query and document", "dot", "prompts query and passage", "Normalize before Dense", "truncate_dim"])]  # fmt: skip
    assert news == [(), (), ("document prompt ''",), ("modules ['Normalize', 'Dense']",), ("truncate_dim 16",)]


def test_weights_in_a_second_format_change_nothing(tmp_path: Path) -> None:
    """A clone has weights in two formats. transformers reads one of them, and the token subspace belongs to that one."""
    folder = shutil.copytree(TOKENIZER, tmp_path / "clone")
    torch.save({}, folder / "pytorch_model.bin")
    clone, own = load_bi(str(folder), device="cpu"), load_bi("all-MiniLM-L6-v2", device="cpu")
    assert clone.weights == own.weights and clone.token_dimensions == own.token_dimensions == 128


def test_a_model_that_names_no_bound_reads_any_length(tmp_path: Path) -> None:
    folder = bi_encoder(tmp_path, architecture="XLNetModel", d_model=WIDTH, n_layer=2, n_head=4, d_inner=48)
    put(folder, {"sentence_bert_config.json": None})
    assert_bi_is_reference(change(folder, "tokenizer_config.json", model_max_length=None))
