"""The rows `causal` and `causal-0.6b` of bench_models: a causal reranker over 100 documents of one query, beside CrossEncoder.predict on the same pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from rerank_lab.models.base import Inputs
from rerank_lab.models.causal import CausalReranker
from rerank_lab.models.chat import shortened
from rerank_lab.models.kinds import load_cross_encoder
from rerank_lab.models.registry import locate

# Row → the sizes of Qwen3 that its model has; the second are those of Qwen3-Reranker-0.6B. The vocabulary is the tokenizer's.
SHAPES: dict[str, dict[str, Any]] = {
    "causal": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96},
    "causal-0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072},
}  # fmt: skip
TEMPLATE = """<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
<think>

</think>

"""
TASK = "Given a web search query, retrieve relevant passages that answer the query"


def reranker(folder: Path, row: str) -> Path:
    """Writes a causal reranker with random weights, in the layout of sentence-transformers, with the default bi-encoder's tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(locate("all-MiniLM-L6-v2", "bi-encoder"))
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 8192
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, **SHAPES[row]
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.float32 if row == "causal" else torch.bfloat16).save_pretrained(folder)
    passed = {"method": "forward", "method_output_name": "logits"}
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_LogitScore", "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"},
        ],
        "1_LogitScore/config.json": {"true_token_id": yes, "false_token_id": no},
        "sentence_bert_config.json": {
            "transformer_task": "text-generation",
            "modality_config": {"text": passed, "message": {**passed, "format": "flat"}},
            "module_output_name": "causal_logits",
        },
        "config_sentence_transformers.json": {"model_type": "CrossEncoder", "prompts": {"query": TASK}, "default_prompt_name": "query"},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


def cut(folder: Path, texts: Sequence[str], tokens: int) -> list[str]:
    """The texts, cut to this many tokens of the model's tokenizer, so that nobody cuts them later."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [text for text, _ in shortened(tokenizer, texts, tokens, "right")]


def peer(folder: Path, query: str, texts: Sequence[str], precision: str) -> Callable[[], Any]:
    """sentence_transformers.CrossEncoder in this precision."""
    from sentence_transformers import CrossEncoder

    number = torch.bfloat16 if precision == "bf16" else torch.float32
    model, pairs = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": number}), [(query, text) for text in texts]
    return lambda: model.predict(pairs, show_progress_bar=False, activation_fn=torch.nn.Identity(), convert_to_tensor=True)


def ours(folder: Path, query: str, texts: Sequence[str], precision: str) -> Callable[[], Any]:
    """The same pairs here."""
    model = _loaded(folder, precision)
    return lambda: model.score(query, texts, max_tokens=8192)


def flops(folder: Path, query: str, texts: Sequence[str]) -> float:
    """FLOPs of the pairs, by the model's own formula."""
    model = _loaded(folder, "bf16")
    return float(model.flops(model.work(Inputs(query, texts, 8192))))


def _loaded(folder: Path, precision: str) -> CausalReranker:
    model = load_cross_encoder(folder, device="cpu", precision=precision)
    assert isinstance(model, CausalReranker)
    return model
