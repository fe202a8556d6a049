"""Where a cache lies, and the folders in it, each under its one name. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

VECTORS, TEXTS, PLANS, TIMINGS = "vectors", "texts", "plans", "timings"
# What lies beside the vectors: for each folder what a person should know of it.
BESIDE = {
    TEXTS: "texts of collections, for workers of a cluster",
    PLANS: "what such workers were to encode",
    TIMINGS: "what rows cost with every document new",
}


def default_place() -> str:
    """RERANK_LAB_CACHE, a folder or a URL, else rerank_lab in the user's cache folder."""
    return os.environ.get("RERANK_LAB_CACHE") or str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rerank_lab")
