"""What bi-encoder and cross-encoder share: loading a checkpoint, and the forward in length-sorted batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from rerank_lab.errors import UserError

# Padded tokens of one batch. On a CPU small batches keep the activations in cache; a GPU wants them large.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 65536, "mps": 16384}
# Characters tokenised at once: a tokenizer's own objects take a hundred times the bytes of what is kept of them.
CHARACTERS = 1 << 18


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text or a pair as a model reads it, special tokens included.

    Attributes:
        ids: L, int32.
        types: L, int8, the segment of each.
        special: L, bool.
        wanted: tokens before truncation, special ones not counted.
    """

    ids: np.ndarray
    types: np.ndarray
    special: np.ndarray
    wanted: int

    @classmethod
    def of(cls, encoding: Encoding, wanted: int) -> Tokens:
        """From the tokenizer's own object."""
        mask = np.array(encoding.special_tokens_mask, dtype=bool)
        return cls(np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.int8), mask, wanted)

    def __len__(self) -> int:
        return len(self.ids)


def encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoding]:
    """The texts' own tokens, no special ones, never many texts' at once."""
    start, size = 0, 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= CHARACTERS or end == len(texts):
            yield from tokenizer.encode_batch(list(texts[start:end]), add_special_tokens=False)
            start, size = end, 0


def load_checkpoint(kind: Any, folder: Path, name: str, spare: str | None = None) -> tuple[Any, Any]:
    """A Hugging Face model in fp32 and its tokenizer.

    Args:
        kind: AutoModel or one of its like.
        folder: the checkpoint.
        name: what messages call the model.
        spare: weights with this in their name may be missing; transformers makes up any that are.

    Raises:
        UserError: nothing that loads, weights missing, no tokenizer that fits.
    """
    from transformers import AutoTokenizer

    try:
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers, tokenizers and safetensors raise of every kind; each means the same to the user
        raise UserError(f"model {name!r}: {folder} does not load: {str(error).strip().partition(chr(10))[0]}") from error
    missing = sorted(key for key in info["missing_keys"] if spare is None or spare not in key)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"model {name!r}: the weights {', '.join(missing[:3])}{more} are not in {folder}")
    if not tokenizer.is_fast:
        raise UserError(f"model {name!r} has no fast tokenizer (tokenizer.json), which is needed")
    # Without its files transformers makes a tokenizer of the special tokens alone; a vocabulary padded to a round size is fine.
    vocabulary = getattr(model.config, "vocab_size", 0)
    if len(tokenizer) < vocabulary // 2:
        raise UserError(f"model {name!r}: the tokenizer in {folder} knows {len(tokenizer)} tokens, the model {vocabulary}")
    return model.eval(), tokenizer


def plan_batches(lengths: Sequence[int], budget: int) -> list[np.ndarray]:
    """Positions in batches: longest first, each padded to at most `budget` tokens (one text alone may exceed it)."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def token_budget(device: torch.device) -> int:
    """Padded tokens of one batch on a device."""
    return TOKEN_BUDGET.get(device.type, 4096)


def forward(
    model: torch.nn.Module, tokens: Sequence[Tokens], *, pad_id: int, token_types: bool, device: torch.device, **options: bool
) -> Iterator[tuple[np.ndarray, Tensor, Any]]:
    """Runs the model over all texts.

    Args:
        model: a Hugging Face model in eval mode.
        tokens: what it reads.
        pad_id: the tokenizer's padding token.
        token_types: whether the model takes token_type_ids.
        device: where the model is.
        options: the model's own (output_hidden_states).

    Yields:
        (positions of the batch's texts, attention mask B × L, the model's output).
    """
    lengths = [len(t) for t in tokens]
    for batch in plan_batches(lengths, token_budget(device)):
        width = max(1, lengths[batch[0]])
        ids = np.full((len(batch), width), pad_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, position in enumerate(batch):
            text = tokens[position]
            ids[row, : len(text)] = text.ids
            mask[row, : len(text)] = 1
            types[row, : len(text)] = text.types
        inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if token_types else {})
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        with torch.inference_mode():
            yield batch, tensors["attention_mask"], model(**tensors, **options)


def encoder_flops(config: Any, lengths: Tensor) -> int:
    """FLOPs of texts of these lengths in tokens (int64), together, through a transformer encoder; a multiplication and an addition are two.

    A layer has four d × d projections and two of d × m (m = intermediate size), 2·L·(4d² + 2dm), and attention's two
    products over L × L, 4·L²·d. Embeddings, norms, softmax and activations are left out (under 1%).
    """
    d, m = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    total, squares = int(lengths.sum()), int(lengths.square().sum())
    return int(config.num_hidden_layers * (2 * total * (4 * d * d + 2 * d * m) + 4 * squares * d))
