"""The v3 reranker API over HTTP. `contract` defines requests and answers, `scheduler` decides what runs when, `service` and `app` tie them together."""
