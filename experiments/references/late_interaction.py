"""ColBERT's score by sentence-transformers' MultiVectorEncoder, which reads the layouts of PyLate and Stanford too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import MultiVectorEncoder
from torch import Tensor


def vectors(folder: Path, texts: Sequence[str], kind: str) -> list[Tensor]:
    """Token vectors of N texts of a kind, "query" or "document": a tensor each, tokens × r, fp32."""
    model = MultiVectorEncoder(str(folder), device="cpu")
    return [*(model.encode_query if kind == "query" else model.encode_document)(list(texts))]


def scores(folder: Path, query: str, documents: Sequence[str]) -> list[float]:
    """Σ_i max_j q_i · d_j of a query with N documents."""
    (q,) = vectors(folder, [query], "query")
    return [float((q @ d.T).amax(1).sum()) for d in vectors(folder, documents, "document")]
