"""The multi-vector score of BAAI/bge-m3 by FlagEmbedding's formula, in plain transformers.

vectors = normalize(colbert_linear(last_hidden_state[:, 1:])), of queries and documents alike, the last special token included. FlagEmbedding
divides the sum by the number of the query's vectors (BGEM3FlagModel.colbert_score), which orders documents alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers import AutoModel, AutoTokenizer


def vectors(folder: Path, texts: Sequence[str]) -> list[Tensor]:
    """Token vectors of N texts: a tensor each, tokens × r, fp32."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    head = torch.load(folder / "colbert_linear.pt", map_location="cpu", weights_only=True)
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings - 2)
    with torch.inference_mode():
        found = []
        for text in texts:
            states = model(**tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")).last_hidden_state[0, 1:]
            found.append(normalize(linear(states, head["weight"], head["bias"]), dim=-1))
    return found


def scores(folder: Path, query: str, documents: Sequence[str]) -> list[float]:
    """Σ_i max_j q_i · d_j of a query with N documents."""
    (q,) = vectors(folder, [query])
    return [float((q @ d.T).amax(1).sum()) for d in vectors(folder, documents)]
