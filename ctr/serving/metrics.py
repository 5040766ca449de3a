"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
ROWS = (1, 10, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter("tessera_requests", "answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "tessera_request_seconds", "from a request to its answer", ["path"], buckets=SECONDS, registry=registry
        )
        self.rows = Counter("tessera_rows", "rows scored", registry=registry)
        self.pass_rows = Histogram("tessera_pass_rows", "rows of one pass", buckets=ROWS, registry=registry)
        self.pass_requests = Histogram("tessera_pass_requests", "requests of a pass", buckets=ROWS, registry=registry)
        self.pass_seconds = Histogram("tessera_pass_seconds", "of one pass", buckets=SECONDS, registry=registry)
        self.updates = Counter("tessera_model_updates", "of the served model", ["result"], registry=registry)
        self.labels = Counter("tessera_feedback_labels", "that came later", ["result"], registry=registry)
        self.memory_rows = Gauge("tessera_memory_rows", "rows in the error memory", registry=registry)
        self.step = Gauge("tessera_model_step", "training step of the served model", registry=registry)

    def passed(self, requests: int, rows: int, seconds: float) -> None:
        """Note one pass of the model."""
        self.rows.inc(rows)
        self.pass_requests.observe(requests)
        self.pass_rows.observe(rows)
        self.pass_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
