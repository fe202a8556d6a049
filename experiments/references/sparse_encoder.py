"""Scores of a sparse encoder (SPLADE) by sentence-transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import SparseEncoder


def scores(folder: Path, query: str, documents: Sequence[str]) -> list[float]:
    """The dot product of a query with each document, by encode_query and encode_document.

    It is summed in fp64: sentence-transformers sums hundreds of products in fp32, which alone moves a score of 1000 by 0.001.
    """
    model = SparseEncoder(str(folder), device="cpu")
    one, many = (encode(texts, batch_size=1) for encode, texts in ((model.encode_query, [query]), (model.encode_document, list(documents))))
    found: list[float] = (many.to_dense().double() @ one.to_dense().double()[0]).tolist()
    return found
