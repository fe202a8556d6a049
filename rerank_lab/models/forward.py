"""The transformer forward that bi-encoder and cross-encoder share: length-sorted batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

# Padded tokens of one batch. On a CPU small batches keep the activations in cache; a GPU wants them large.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 65536, "mps": 16384}


def plan_batches(lengths: Sequence[int], budget: int) -> list[np.ndarray]:
    """Positions in batches: longest first, each padded to at most `budget` tokens (one text alone may exceed it)."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def forward(
    model: torch.nn.Module, encodings: Sequence[Encoding], *, pad_id: int, token_types: bool, device: torch.device, budget: int | None = None
) -> Iterator[tuple[np.ndarray, Tensor, Any]]:
    """Runs the model over all encodings.

    Args:
        model: a Hugging Face model in eval mode.
        encodings: tokenised texts, special tokens included.
        pad_id: the tokenizer's padding token.
        token_types: whether the model takes token_type_ids.
        device: where the model is.
        budget: padded tokens a batch; None: TOKEN_BUDGET of the device.

    Yields:
        (positions of the batch's texts, attention mask B × L, the model's output).
    """
    lengths = [len(e.ids) for e in encodings]
    for batch in plan_batches(lengths, budget or TOKEN_BUDGET.get(device.type, 4096)):
        width = max(1, lengths[batch[0]])
        ids = np.full((len(batch), width), pad_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, position in enumerate(batch):
            encoding = encodings[position]
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
            types[row, : len(encoding.ids)] = encoding.type_ids
        inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if token_types else {})
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        with torch.inference_mode():
            yield batch, tensors["attention_mask"], model(**tensors)


def encoder_flops(config: Any, length: int) -> int:
    """FLOPs of one text of `length` tokens through a transformer encoder; a multiplication and an addition are two.

    A layer has four d × d projections and two of d × m (m = intermediate size), 2·L·(4d² + 2dm), and attention's two
    products over L × L, 4·L²·d. Embeddings, norms, softmax and activations are left out (under 1%).
    """
    d, m = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    return int(config.num_hidden_layers * (2 * length * (4 * d * d + 2 * d * m) + 4 * length * length * d))
