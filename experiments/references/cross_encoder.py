"""The scores of cross-encoders by sentence_transformers.CrossEncoder: logits, before any activation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


def scores(folder: Path, query: str, documents: Sequence[str], instruction: str | None = None) -> list[float]:
    """The logit of each document.

    Args:
        folder: a checkpoint that sentence-transformers loads by itself.
        query, documents: texts.
        instruction: in place of the default prompt; None: the folder's.
    """
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu")
    if model.tokenizer.pad_token_id is not None and model.config.pad_token_id is None:  # it refuses to pad otherwise
        model.config.pad_token_id = model.tokenizer.pad_token_id
    pairs = [(query, document) for document in documents]
    found: list[float] = model.predict(pairs, prompt=instruction, activation_fn=torch.nn.Identity(), show_progress_bar=False).tolist() if pairs else []
    return found
