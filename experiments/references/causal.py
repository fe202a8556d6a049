"""The scores of causal rerankers by the formulas that their authors publish, in plain transformers, one pair at a time.

Qwen3-Reranker         https://huggingface.co/Qwen/Qwen3-Reranker-0.6B (its card, as of 2025): yes - no
mxbai-rerank-v2        https://github.com/mixedbread-ai/mxbai-rerank: 1 - 0
bge-reranker-v2-gemma  https://github.com/FlagOpen/FlagEmbedding (BaseLLMReranker, with its defaults): Yes

A folder with LogitScore is scored by sentence_transformers.CrossEncoder (cross_encoder.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

QWEN_TASK = "Given a web search query, retrieve relevant passages that answer the query"
QWEN_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)  # fmt: skip
MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document pair, carefully analyze "
    "the semantic relationship between them, then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)
GEMMA_TASK = "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a prediction of either 'Yes' or 'No'."


def qwen3(tokenizer: Any, query: str, document: str, instruction: str | None) -> tuple[list[int], list[int]]:
    """The tokens of a pair, and the tokens yes and no."""
    prefix = tokenizer.encode(f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\n", add_special_tokens=False)
    suffix = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", add_special_tokens=False)
    text = f"<Instruct>: {QWEN_TASK if instruction is None else instruction}\n<Query>: {query}\n<Document>: {document}"
    pair = tokenizer(text, truncation="longest_first", max_length=8192 - len(prefix) - len(suffix)).input_ids
    return prefix + pair + suffix, [tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no")]


def mxbai(tokenizer: Any, query: str, document: str, instruction: str | None) -> tuple[list[int], list[int]]:
    """As qwen3."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    prefix = ids("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    suffix, separator, task = ids("<|im_end|>\n<|im_start|>assistant\n"), ids("\n"), ids(MXBAI_TASK)
    static = len(prefix) + len(task) + len(suffix) + len(separator)
    longest = min(8192, tokenizer.model_max_length - static)
    asked = ids(f"instruction: {instruction}\nquery: {query}" if instruction else f"query: {query}")[: longest * 3 // 4]
    pair = [*asked, *separator, *ids(f"document: {document}")[: min(tokenizer.model_max_length - len(asked) - static, longest)]][:longest]
    return prefix + pair + separator + task + suffix, [ids("1")[0], ids("0")[0]]


def gemma(tokenizer: Any, query: str, document: str, instruction: str | None) -> tuple[list[int], list[int]]:
    """As qwen3; the instruction is what FlagEmbedding calls the prompt."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    prompt, separator = ids(GEMMA_TASK if instruction is None else instruction), ids("\n")
    asked, passage = ids(f"A: {query}")[: 512 * 3 // 4], ids(f"B: {document}")[:512]
    pair = [tokenizer.bos_token_id, *asked, *separator, *passage][: 512 + len(separator) + len(prompt)]
    return [*pair, *separator, *prompt], [ids("Yes")[0]]


FORMULAS: dict[str, Callable[[Any, str, str, str | None], tuple[list[int], list[int]]]] = {
    "Qwen3ForCausalLM": qwen3, "Qwen2ForCausalLM": mxbai, "GemmaForCausalLM": gemma,
}  # fmt: skip


@torch.inference_mode()
def scores(folder: Path, query: str, documents: Sequence[str], instruction: str | None = None) -> list[float]:
    """The score of each document.

    Args:
        folder: a checkpoint of one of these families, without modules.json.
        query, documents: texts.
        instruction: the task; None: the family's own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    formula = FORMULAS[json.loads((folder / "config.json").read_text())["architectures"][0]]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for document in documents:
        tokens, (yes, *no) = formula(tokenizer, query, document, instruction)
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        found.append(float(logits[yes] - (logits[no[0]] if no else 0)))
    return found
