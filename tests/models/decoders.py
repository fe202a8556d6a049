"""Makes small random causal rerankers and decoders with a head, in the layouts of their families, with tokenizers of their kind."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.conftest import ROOT
from tests.models.checkpoints import BASE, modules, put

SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CHAT = (  # what Qwen's own checkpoints carry: it has no place for a query and a document
    "{%- for message in messages %}{%- if message.role in ['system', 'user', 'assistant'] %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
)
ROLES = """<|im_start|>system
Answer "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first | default("Given a query, find what answers it") }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
"""
NO_SYSTEM = (
    "<|im_start|>system\n{{ (messages | selectattr('role', 'eq', 'query') | first).content }}<|im_end|>\n<|im_start|>user\n"
    "{{ (messages | selectattr('role', 'eq', 'document') | first).content }}<|im_end|>\n"
    "{%- if add_generation_prompt %}\n<|im_start|>assistant\n{%- endif %}\n"
)
STRUCTURED = (
    'Q: {{ (messages | selectattr("role", "eq", "query") | first).content[0].text }}\n'
    'D: {{ (messages | selectattr("role", "eq", "document") | first).content[0].text }}\nAnswer:'
)
TASK = "Given a web search query, retrieve relevant passages that answer the query"
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16384,
}  # fmt: skip


def texts() -> list[str]:
    """Documents of the bundled collection."""
    lines = (ROOT / "rerank_lab" / "data" / "numpydoc" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    return [f"{row['title']} {row['text']}" for row in map(json.loads, lines)]


@cache
def qwen_tokenizer() -> str:
    """A tokenizer of Qwen's kind, as JSON: bytes, merged over the words' leading spaces, and no special token of its own."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    words = ["yes", "no", "Yes", "No"] * 400
    made.train_from_iterator([*texts(), *words], trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    made.post_processor, made.decoder = processors.ByteLevel(trim_offsets=False), decoders.ByteLevel()
    return str(made.to_str())


@cache
def gemma_tokenizer() -> str:
    """A tokenizer of Gemma's kind, as JSON: words with ▁ before them, bytes for what it does not know, and <bos> first."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer, made.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(Regex("▁?[^▁\\n]+|▁+|\\n+"), "isolated")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{n:02X}>" for n in range(256))]
    made.train_from_iterator([*texts(), *["Yes\nNo"] * 300], trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    about = json.loads(made.to_str())
    about["added_tokens"] = [token for token in about["added_tokens"] if not token["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(about))
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", made.token_to_id("<bos>"))])
    return str(made.to_str())


def decoder(folder: Path, architecture: str = "Qwen3ForCausalLM", chat: str | None = CHAT, **config: Any) -> Path:
    """A decoder with a head, its tokenizer, and the tokenizer's chat template."""
    gemma = architecture.startswith("Gemma")
    tokenizer = gemma_tokenizer() if gemma else qwen_tokenizer()
    size = max(Tokenizer.from_str(tokenizer).get_vocab().values()) + 1
    find = Tokenizer.from_str(tokenizer).token_to_id
    kind = getattr(transformers, architecture)
    special = {"pad_token_id": find("<pad>" if gemma else "<|endoftext|>"), "eos_token_id": find("<eos>" if gemma else "<|im_end|>")}
    heads = {"head_dim": 16} if gemma or "Qwen3" in architecture else {}
    model = kind(kind.config_class(**SMALL | special | heads | {"bos_token_id": find("<bos>") if gemma else None, "vocab_size": size} | config)).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim >= 2:
                weights.copy_(torch.randn(weights.shape, generator=g) * weights.shape[-1] ** -0.5)
            elif "norm" not in name.lower():
                weights.copy_(torch.randn(weights.shape, generator=g) * 0.1)
    model.save_pretrained(folder)
    about: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer" if gemma else "Qwen2Tokenizer",
        "model_max_length": 131072,
        "pad_token": "<pad>" if gemma else "<|endoftext|>",
        "eos_token": "<eos>" if gemma else "<|im_end|>",
        "padding_side": "left",
    }
    about |= {"bos_token": "<bos>", "unk_token": "<unk>"} if gemma else {"bos_token": None, "unk_token": None, "add_prefix_space": False}
    about |= {} if chat is None or gemma else {"chat_template": chat}
    return put(folder, {"tokenizer.json": tokenizer, "tokenizer_config.json": about})


def logit_score(
    folder: Path,
    architecture: str = "Qwen3ForCausalLM",
    chat: str = ROLES,
    prompts: dict[str, str] | None = None,
    no: str | None = "no",
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A causal reranker in the layout of sentence-transformers 5.4 and later."""
    find = Tokenizer.from_str(qwen_tokenizer()).token_to_id
    passed = {"method": "forward", "method_output_name": "logits"}
    message = {"text": passed, "message": passed | {"format": "structured" if chat == STRUCTURED else "flat"}}
    asked = {"query": TASK} if prompts is None else prompts
    return put(
        decoder(folder, architecture, None, **config),
        {
            "chat_template.jinja": chat,
            "modules.json": modules(BASE + "transformer.Transformer", "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"),
            "1_LogitScore/config.json": {"true_token_id": find("yes"), "false_token_id": None if no is None else find(no), "module_input_name": "causal_logits"},
            "sentence_bert_config.json": {"transformer_task": "text-generation", "modality_config": message, "module_output_name": "causal_logits"}
            | (settings or {}),
            "config_sentence_transformers.json": {
                "model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity", "prompts": asked, "default_prompt_name": next(iter(asked), None),
            },
        },
    )  # fmt: skip


def chat_classifier(folder: Path, chat: str = ROLES, **settings: Any) -> Path:
    """A decoder with a classification head that reads pairs by a chat template, in the layout of sentence-transformers."""
    passed = {"method": "forward", "method_output_name": "logits"}
    return put(
        decoder(folder, "Qwen3ForSequenceClassification", None, num_labels=1),
        {
            "chat_template.jinja": chat,
            "modules.json": modules(BASE + "transformer.Transformer"),
            "sentence_bert_config.json": {
                "transformer_task": "sequence-classification", "modality_config": {"text": passed, "message": passed | {"format": "flat"}},
                "module_output_name": "scores",
            } | settings,
            "config_sentence_transformers.json": {"model_type": "CrossEncoder", "prompts": {"query": TASK}, "default_prompt_name": "query"},
        },
    )  # fmt: skip
