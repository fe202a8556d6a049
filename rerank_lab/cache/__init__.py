"""python -m rerank_lab.cache: vectors that are made once, and the command that shows and clears them."""
