"""python -m rerank_lab.report: results folders → report.md and a page that opens from disk."""
