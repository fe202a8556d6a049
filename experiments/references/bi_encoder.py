"""Scores of a bi-encoder or of static embeddings by sentence-transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import SentenceTransformer


def scores(folder: Path, query: str, documents: Sequence[str]) -> list[float]:
    """The model's own similarity of a query with each document, by encode_query and encode_document."""
    model = SentenceTransformer(str(folder), device="cpu")
    one, many = (
        encode(texts, batch_size=1, convert_to_tensor=True) for encode, texts in ((model.encode_query, [query]), (model.encode_document, list(documents)))
    )
    found: list[float] = model.similarity(one, many)[0].tolist()
    return found
