"""python -m rerank_lab.replay: recorded requests to two servers, and where their answers differ."""
