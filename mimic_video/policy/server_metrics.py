"""What the policy server counts for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class ServerMetrics:
    """What `/metrics` shows of one server; `text` has it in Prometheus' text format 0.0.4."""

    def __init__(self, batch_sizes: tuple[int, ...]):
        self._registry = CollectorRegistry()  # the default one is the process's, which may have several servers
        kept: dict[str, Any] = {"namespace": "mimic_video", "registry": self._registry}
        self.requests = Counter("requests", "Messages from clients", **kept)
        self.answers = Counter("answers", "Action chunks sent, one for each request", **kept)
        self.errors = Counter("errors", "Messages answered with an error", ["kind"], **kept)
        self.connections = Gauge("connections", "Open connections", **kept)
        self.queue_depth = Gauge("queue_depth", "Requests that wait for the policy", **kept)
        self.latency = Histogram(
            "latency_seconds", "From a message's arrival to its action chunk", buckets=_LATENCY_BOUNDS, **kept
        )
        self.robots = Histogram("batch_robots", "Robots in one call of the policy", buckets=sorted(batch_sizes), **kept)

    def text(self) -> str:
        return generate_latest(self._registry).decode()
