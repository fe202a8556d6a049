"""A checkpoint of another family, or with something unsupported, is refused by a message that says what it is and what to do."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rerank_lab.errors import UserError
from rerank_lab.models.families import CAUSAL, LATE, SAID, SPARSE
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from tests.models.checkpoints import BASE, MODELS, Make, add_weights, bi_encoder, change, cross_encoder, model2vec, modules, put, st_about, static, transformer

LOGIT_SCORE = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"


def assert_refused(load: Callable[..., object], make: Make, message: str, folder: Path) -> None:
    """Loading what is made in the folder fails with this message."""
    with pytest.raises(UserError) as refused:
        load(str(make(folder)), device="cpu")
    assert message in str(refused.value)


def own_folder(folder: Path) -> Path:
    """The same folder, with the transformer in 0_Transformer."""
    (folder / "0_Transformer").mkdir()
    for path in [p for p in folder.iterdir() if p.is_file() and p.name != "modules.json"]:
        path.rename(folder / "0_Transformer" / path.name)
    listed = modules("Transformer", "Pooling")
    return put(folder, {"modules.json": [listed[0] | {"path": "0_Transformer"}, listed[1]]})


# What is refused in both roles: the files that cause it, and the message.

ELSEWHERE: dict[str, tuple[Make, str]] = {
    "SPLADE": (
        lambda f: put(transformer(f, "BertForMaskedLM"), {"modules.json": modules("sentence_transformers.sparse_encoder.models.MLMTransformer")}),
        SAID[SPARSE],
    ),
    "SPLADE by model_type": (lambda f: bi_encoder(f, about=st_about(model_type="SparseEncoder")), SAID[SPARSE]),
    "a causal reranker": (lambda f: transformer(f, "Qwen3ForCausalLM"), SAID[CAUSAL]),
    "a causal model that says nothing of pooling": (lambda f: transformer(f, "Qwen3Model"), SAID[CAUSAL]),
    "a masked language model": (lambda f: transformer(f, "BertForMaskedLM"), "is a masked language model (BertForMaskedLM) that no file says how to pool"),
    "a tagger": (lambda f: transformer(f, "BertForTokenClassification"), "is a BertForTokenClassification, which is neither"),
    "an encoder-decoder": (
        lambda f: change(bi_encoder(f), "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "is an encoder-decoder or a half of one (T5ForConditionalGeneration)",
    ),
    "own code": (
        lambda f: put(change(bi_encoder(f), "config.json", auto_map={"AutoModel": "modeling.Mine"}), {"modeling.py": "raise SystemExit('it ran')\n"}),
        "brings code of its own (modeling.Mine), which is never run here",
    ),
    "own code of the tokenizer": (
        lambda f: change(bi_encoder(f), "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokens.Mine"]}),
        "brings code of its own (tokens.Mine)",
    ),
    "quantised weights": (lambda f: change(bi_encoder(f), "config.json", quantization_config={"quant_method": "gptq"}), "holds weights quantised by gptq"),
    "attention that depends on what was read before": (
        lambda f: bi_encoder(f, architecture="BigBirdModel", attention_type="block_sparse", block_size=4),
        "attends by blocks (attention_type block_sparse)",
    ),
    "LoRA": (
        lambda f: put(transformer(f), {"adapter_config.json": {"base_model_name_or_path": "BAAI/bge-base-en"}}),
        "is a LoRA adapter of BAAI/bge-base-en, without the weights that it changes; merge them first",
    ),
    "LoRA in the transformer's own folder": (
        lambda f: put(own_folder(bi_encoder(f)), {"0_Transformer/adapter_config.json": {"base_model_name_or_path": "base"}}),
        "is a LoRA adapter of base",
    ),
    "a pointer of git-lfs": (
        lambda f: put(bi_encoder(f), {"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}),
        "model.safetensors is a pointer of git-lfs and no file yet; run git lfs pull",
    ),
    "images beside text": (
        lambda f: change(transformer(f), "config.json", model_type="clip", architectures=["CLIPModel"], text_config={}, vision_config={}),
        "is a model of more than text (CLIPModel)",
    ),
    "DPR": (lambda f: change(transformer(f), "config.json", model_type="dpr", architectures=["DPRContextEncoder"]), "is a half of DPR (DPRContextEncoder)"),
    "ONNX alone": (
        lambda f: put(bi_encoder(f), {"model.safetensors": None, "onnx/model.onnx": "x"}),
        "has weights for ONNX alone, which are not read here; name the model that they were made of",
    ),
    "GGUF alone": (lambda f: put(bi_encoder(f), {"model.safetensors": None, "model-q8.gguf": "x"}), "has weights for GGUF alone"),
    "both roles at once": (
        lambda f: bi_encoder(f, architecture="BertForSequenceClassification", num_labels=1),
        "says two things: modules.json makes it a bi-encoder (Transformer, Pooling), config.json a cross-encoder (BertForSequenceClassification)",
    ),
    "a module of another package": (
        lambda f: put(bi_encoder(f), {"modules.json": modules("Transformer", "mine.models.Pooling")}),
        "first, not mine.models.Pooling",
    ),
    "a Router": (
        lambda f: put(transformer(f), {"modules.json": modules("Router", "Normalize")}),
        f"first, not {MODELS}Router; Router: queries and documents go through modules of their own",
    ),
    "several layers": (
        lambda f: put(bi_encoder(f), {"modules.json": modules("Transformer", "WeightedLayerPooling", "Pooling")}),
        f"first, not {MODELS}WeightedLayerPooling; WeightedLayerPooling: it pools over several layers of the transformer",
    ),
    "a model_type that is not known": (lambda f: bi_encoder(f, about=st_about(model_type="Holographic")), "is a Holographic (model_type in"),
    "a module outside the folder": (
        lambda f: put(bi_encoder(f), {"modules.json": [*modules("Transformer"), {"path": "../1_Pooling", "type": MODELS + "Pooling"}]}),
        "each with a type, a path inside the folder and no kwargs",
    ),
}


@pytest.mark.parametrize("load", [load_bi_encoder, load_cross_encoder])
@pytest.mark.parametrize("family", ELSEWHERE)
def test_what_is_something_else_is_refused_by_name_in_both_roles(family: str, load: Callable[..., object], tmp_path: Path) -> None:
    make, message = ELSEWHERE[family]
    with pytest.raises(UserError) as refused:
        load(str(make(tmp_path)), device="cpu")
    said = str(refused.value)
    assert all(part in said for part in message.split("{sign}")), said
    assert "\n" not in said and len(said) < 500


BI_REFUSED: dict[str, tuple[Make, str]] = {
    "a cross-encoder": (cross_encoder, "is a cross-encoder (BertForSequenceClassification), and a bi-encoder is needed here; give it as --model-cross"),
    "a cross-encoder of modules": (
        lambda f: bi_encoder(f, "Dense", about=st_about(model_type="CrossEncoder")),
        "is a cross-encoder made of modules (Transformer, Pooling, Dense), and a bi-encoder is needed here; give it as --model-cross",
    ),
    "a head of scores": (
        lambda f: change(bi_encoder(f, "Dense"), "2_Dense/config.json", module_output_name="scores"),
        "is a cross-encoder made of modules (Transformer, Pooling, Dense), and a bi-encoder is needed here; give it as --model-cross",
    ),
    "a causal reranker of sentence-transformers": (
        lambda f: put(transformer(f, "Qwen3ForCausalLM"), {"modules.json": modules("Transformer", LOGIT_SCORE)}),
        "yes or no, and a bi-encoder is needed here; give it as --model-cross",
    ),
    "weights that nothing takes": (lambda f: add_weights(bi_encoder(f), "linear.weight"), "nothing takes the weights linear.weight in"),
    "a head that its architecture does not have": (
        lambda f: add_weights(bi_encoder(f, architecture="BertForMaskedLM"), "projection.weight", "more.weight"),
        "nothing takes the weights cls.predictions",
    ),
    "a head of a class that transformers lacks": (
        lambda f: add_weights(change(bi_encoder(f), "config.json", architectures=["FooForMaskedLM"]), "lm_head.weight"),
        "nothing takes the weights lm_head.weight",
    ),
    "layers past those of its configuration": (
        lambda f: change(bi_encoder(f), "config.json", num_hidden_layers=1),
        "nothing takes the weights encoder.layer.1.attention.output.LayerNorm.bias",
    ),
    "a Transformer alone": (lambda f: put(bi_encoder(f), {"modules.json": modules("Transformer")}), "names no Pooling"),
    "weights of another shape": (lambda f: change(bi_encoder(f), "config.json", intermediate_size=60), "are 48 in the file and 60 by config.json"),
    "no room for a text": (lambda f: bi_encoder(f, limit=2), "a limit of 2 tokens leaves none for the text"),
    "another similarity": (lambda f: bi_encoder(f, about=st_about(similarity_fn_name="euclidean")), "compares by euclidean"),
    "truncate_dim of no number": (lambda f: bi_encoder(f, about=st_about(truncate_dim="16")), "truncate_dim in config_sentence_transformers.json must be"),
    "a key that is not known": (
        lambda f: bi_encoder(f, about=st_about(pooling_scale=2)),
        "config_sentence_transformers.json has pooling_scale, which is not understood",
    ),
    "a setting that is not known": (lambda f: change(bi_encoder(f), "sentence_bert_config.json", stride=3), "sentence_bert_config.json has stride"),
    "arguments of its own": (
        lambda f: change(bi_encoder(f), "sentence_bert_config.json", model_args={"num_hidden_layers": 1}),
        "model_args in its Transformer's settings gives num",
    ),
    "a pooling key that is not known": (lambda f: change(bi_encoder(f), "1_Pooling/config.json", temperature=2), "1_Pooling/config.json has temperature"),
    "a Normalize of something else": (
        lambda f: put(bi_encoder(f, "Normalize"), {"2_Normalize/config.json": {"module_input_name": "token_embeddings"}}),
        "2_Normalize normalises token_embeddings, which is not known here",
    ),
    "a task of another kind": (
        lambda f: change(bi_encoder(f), "sentence_bert_config.json", transformer_task="fill-mask"),
        "runs its transformer for fill-mask",
    ),
    "a chat template": (
        lambda f: change(bi_encoder(f), "sentence_bert_config.json", modality_config={"text": {}, "message": {}}),
        "reads its input through a chat template",
    ),
    "query expansion": (lambda f: change(bi_encoder(f), "sentence_bert_config.json", query_length=32), "query_length in its Transformer's settings is 32"),
    "a default prompt that is not there": (
        lambda f: bi_encoder(f, about=st_about(prompts={"a": "b"}, default_prompt_name="c")),
        "default_prompt_name 'c' is none of its prompts (a)",
    ),
    "a pooling without its configuration": (lambda f: put(bi_encoder(f), {"1_Pooling/config.json": None}), "1_Pooling/config.json is missing"),
    "two poolings in another order": (
        lambda f: put(bi_encoder(f), {"modules.json": modules("Transformer", "Normalize", "Pooling")}),
        "first, not Transformer, Normalize, Pooling",
    ),
    "no modules.json beside a pooling": (lambda f: put(bi_encoder(f), {"modules.json": None}), "has 1_Pooling, sentence_bert_config.json but no modules.json"),
    "no modules.json beside prompts": (
        lambda f: put(transformer(f), {"config_sentence_transformers.json": st_about(prompts={"query": "q: "})}),
        "has prompts in config_sentence_transformers.json but no modules.json",
    ),
    "an activation of another package": (
        lambda f: change(bi_encoder(f, "Dense"), "2_Dense/config.json", activation_function="mine.Tanh"),
        "activation mine.Tanh (mine.Tanh) of its Dense module is not known",
    ),
}


@pytest.mark.parametrize("case", BI_REFUSED)
def test_what_a_bi_encoder_does_not_do_is_refused(case: str, tmp_path: Path) -> None:
    assert_refused(load_bi_encoder, *BI_REFUSED[case], tmp_path)


COLBERT = SAID[LATE].partition("{")[0]
CROSS_REFUSED: dict[str, tuple[Make, str]] = {
    "static embeddings": (static, "and a cross-encoder is needed here; give it as --model"),
    "model2vec": (model2vec, "is a static embedding model (as sentence_transformers.models.StaticEmbedding in modules.json says)"),
    "PyLate": (lambda f: put(bi_encoder(f), {"modules.json": modules("Transformer", "pylate.models.Dense.Dense")}), COLBERT),
    "sentence-transformers' MultiVectorEncoder": (lambda f: bi_encoder(f, about=st_about(model_type="MultiVectorEncoder")), COLBERT),
    "ColBERT by its similarity": (lambda f: bi_encoder(f, about=st_about(similarity_fn_name="MaxSim")), COLBERT),
    "Stanford's ColBERT": (lambda f: put(transformer(f), {"artifact.metadata": {"query_maxlen": 32}}), COLBERT),
    "Stanford's ColBERT by its architecture": (lambda f: change(transformer(f), "config.json", architectures=["HF_ColBERT"]), COLBERT),
    "Dense on tokens": (lambda f: put(bi_encoder(f), {"modules.json": modules("Transformer", BASE + "dense.Dense")}), COLBERT),
    "a bi-encoder": (lambda f: bi_encoder(f, "Normalize"), "is a bi-encoder (BertModel), and a cross-encoder is needed here; give it as --model"),
    "weights that nothing takes": (lambda f: add_weights(cross_encoder(f), "score.weight"), "nothing takes the weights score.weight in"),
    "a chat template without both roles": (
        lambda f: put(cross_encoder(f), {"chat_template.jinja": "{{ messages[0].content }}"}), "its chat template has no place for document (roles"),
    "a chat template in the tokenizer, without both roles": (
        lambda f: change(cross_encoder(f), "tokenizer_config.json", chat_template="{{ messages[-1].role }}"), "its chat template has no place for query and document"),
    "a causal reranker of sentence-transformers that names no token": (
        lambda f: put(transformer(f, "Qwen3ForCausalLM"), {"modules.json": modules("Transformer", LOGIT_SCORE)}), "must name true_token_id and false_token_id"),
    "no room for a pair": (lambda f: change(cross_encoder(f), "tokenizer_config.json", model_max_length=3), "a limit of 3 tokens leaves none for the text"),
    "two labels that the file does not have": (
        lambda f: change(cross_encoder(f), "config.json", id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1}),
        "the weights classifier.bias are 1 in the file and 2 by config.json",
    ),
    "an activation that is not rising": (lambda f: cross_encoder(f, about={"activation_fn": "torch.nn.modules.activation.Softmax"}), "shows its logits through torch.nn.modules.activation.Softmax"),
    "settings without modules.json": (lambda f: put(cross_encoder(f), {"sentence_bert_config.json": {"max_seq_length": 64}}), "has sentence_bert_config.json but no modules.json"),
    "a limit of no number": (lambda f: cross_encoder(f, about={}, max_seq_length="64"), "max_seq_length must be a whole number"),
    "a decoder without any padding token": (
        lambda f: put(
            change(change(change(cross_encoder(f, "Qwen3ForSequenceClassification"), "config.json", pad_token_id=None),
                   "tokenizer_config.json", pad_token=None, tokenizer_class="PreTrainedTokenizerFast"), "tokenizer.json", padding=None),
            {"special_tokens_map.json": {}},
        ),
        "names no padding token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CROSS_REFUSED)
def test_what_a_cross_encoder_does_not_do_is_refused(case: str, tmp_path: Path) -> None:
    assert_refused(load_cross_encoder, *CROSS_REFUSED[case], tmp_path)


def test_nobody_is_asked_whether_to_run_a_folders_code_and_it_is_not_run(tmp_path: Path) -> None:
    folder = change(bi_encoder(tmp_path / "m"), "config.json", model_type="new", auto_map={"AutoConfig": "modeling.C", "AutoModel": "modeling.M"})
    put(folder, {"modeling.py": "open('ran', 'w').close()\n"})
    terminal, end = pty.openpty()
    os.write(terminal, b"y\ny\ny\n")
    command = [sys.executable, "-m", "rerank_lab.eval", "--model", str(folder), "--methods", "fast", "--out", "out"]
    done = subprocess.run(command, check=False, stdin=end, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rerank_lab: error: model") and "brings code of its own" in done.stderr and "[y/N]" not in done.stderr
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "out").exists()
