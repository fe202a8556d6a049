"""python -m rerank_lab.eval: which reranking method is best on a collection, by how much, and at what cost."""
