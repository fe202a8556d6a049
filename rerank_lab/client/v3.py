"""Names and defaults of the v3 reranker API. Imports nothing, so that --help needs no torch."""

from __future__ import annotations

V3 = "/api/v3/inference/reranker"
KEY = "RERANK_LAB_ENDPOINT_KEY"  # environment variable with the key
TIMEOUT = 120.0  # the most seconds for connecting, and between two bytes
