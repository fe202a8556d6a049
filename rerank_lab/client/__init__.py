"""A server that speaks the v3 reranker API, in place of a Reranker."""
