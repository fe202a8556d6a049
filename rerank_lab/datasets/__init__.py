"""Collections: what they hold, how they are loaded, and runs (rankings) as files.

Users import `load_dataset` and `Dataset` from here. Inside the package they are imported from the modules that define them.
"""

from __future__ import annotations

from rerank_lab.datasets.dataset import Dataset
from rerank_lab.datasets.load import load_dataset

__all__ = ["Dataset", "load_dataset"]
