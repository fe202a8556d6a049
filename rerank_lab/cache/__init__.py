"""The cache of vectors, and the command that shows and clears it (python -m rerank_lab.cache)."""
