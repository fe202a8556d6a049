"""Collections: what they hold, where they come from, and rankings of them as files.

`load_dataset` and `Dataset` are here for those who use the library; inside it they are imported from where they stand.
"""

from __future__ import annotations

from rerank_lab.datasets.dataset import Dataset
from rerank_lab.datasets.load import load_dataset

__all__ = ["Dataset", "load_dataset"]
