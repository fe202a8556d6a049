"""The v3 reranker API over HTTP: contract (what is said), scheduler (who runs when), service and app (what ties them)."""
