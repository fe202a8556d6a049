"""Where the cache is, and the names of the folders in it. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

VECTORS, TEXTS, PLANS, TIMINGS = "vectors", "texts", "plans", "timings"
# The folders beside the vectors, with a description for people.
BESIDE = {
    TEXTS: "texts of collections, for workers of a cluster",
    PLANS: "what such workers were to encode",
    TIMINGS: "what rows cost with every document new",
}


def default_place() -> str:
    """The cache's folder or URL: $RERANK_LAB_CACHE, else the folder rerank_lab in the user's cache folder."""
    return os.environ.get("RERANK_LAB_CACHE") or str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rerank_lab")
