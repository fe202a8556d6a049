"""The server's metrics, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # type: ignore[no-untyped-call]
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 16384, 65536)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._tokens = self._padded = 0
        self.requests = Counter("rerank_lab_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram("rerank_lab_request_seconds", "From the first byte of a request to its answer.", ["route"], buckets=SECONDS, registry=registry)
        self.queue_tokens = Gauge("rerank_lab_queue_tokens", "Tokens waiting for a forward.", registry=registry)
        self.requests_waiting = Gauge("rerank_lab_requests_in_flight", "Rerankings accepted and not answered.", registry=registry)
        self.batch_tokens = Histogram("rerank_lab_batch_tokens", "Tokens of a batch, without padding.", buckets=TOKENS, registry=registry)
        self.padding_share = Gauge("rerank_lab_padding_share", "Share of padding in all batches so far.", registry=registry)
        self.model_seconds = Counter("rerank_lab_model_seconds", "Time in which a batch ran.", registry=registry)
        self.documents = Counter("rerank_lab_documents", "Distinct documents whose vectors were wanted, by where they were.", ["cache"], registry=registry)
        self.cache_bytes = Gauge("rerank_lab_cache_bytes", "Held by the vector caches.", registry=registry)
        self.dropped = Counter("rerank_lab_dropped", "Rerankings that ended before their answer.", ["reason"], registry=registry)
        self.failed_batches = Counter("rerank_lab_failed_batches", "Batches that raised.", registry=registry)
        for reason in ("disconnect", "deadline", "queue_full"):
            self.dropped.labels(reason)
        for where in ("hit", "miss"):
            self.documents.labels(where)

    def batch(self, tokens: int, padded: int, seconds: float) -> None:
        """Counts one batch: its tokens, its tokens with padding, and the seconds that it ran."""
        self.model_seconds.inc(seconds)
        self.batch_tokens.observe(tokens)
        self._tokens, self._padded = self._tokens + tokens, self._padded + padded
        self.padding_share.set(1 - self._tokens / max(1, self._padded))

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
