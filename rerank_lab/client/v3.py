"""How a server that speaks the v3 reranker API is asked. Imports nothing, so that --help needs no torch."""

from __future__ import annotations

V3 = "/api/v3/inference/reranker"
KEY = "RERANK_LAB_ENDPOINT_KEY"  # the environment variable that holds the key
TIMEOUT = 120.0  # seconds to connect in, and without a byte
