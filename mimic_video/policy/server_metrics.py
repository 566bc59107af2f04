"""Counters of the policy server in Prometheus' text format."""

from collections import Counter

_LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
_PREFIX = "mimic_video_"


class Histogram:
    """Counts of values up to each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[sum(value > bound for bound in self._bounds)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip((*map("{:g}".format, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:g}", f"{name}_count {total}"]


class ServerMetrics:
    """What `/metrics` shows. Written by the event loop only, so there are no locks."""

    def __init__(self, batch_sizes: tuple[int, ...]):
        self.requests = 0  # messages of clients
        self.answers = 0  # action chunks, one for each request
        self.errors: Counter[str] = Counter()  # by kind
        self.connections = self.queue_depth = 0
        self.latency = Histogram(_LATENCY_BOUNDS)  # from a message's arrival to its answer
        self.robots = Histogram(tuple(float(size) for size in sorted(batch_sizes)))  # of a call of the policy

    def text(self) -> str:
        """One metric after another, each with its help and type."""
        single = [
            ("requests_total", "counter", "Messages from clients", self.requests),
            ("answers_total", "counter", "Action chunks sent", self.answers),
            ("connections", "gauge", "Open connections", self.connections),
            ("queue_depth", "gauge", "Requests that wait for the policy", self.queue_depth),
        ]
        lines = []
        for name, kind, description, value in single:
            lines += [*_head(name, kind, description), f"{_PREFIX}{name} {value}"]
        lines += _head("errors_total", "counter", "Messages answered with an error")
        lines += [f'{_PREFIX}errors_total{{kind="{kind}"}} {count}' for kind, count in sorted(self.errors.items())]
        for name, description, histogram in (
            ("latency_seconds", "From a message's arrival to its action chunk", self.latency),
            ("batch_robots", "Robots in one call of the policy", self.robots),
        ):
            lines += [*_head(name, "histogram", description), *histogram.lines(_PREFIX + name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, description: str) -> list[str]:
    return [f"# HELP {_PREFIX}{name} {description}", f"# TYPE {_PREFIX}{name} {kind}"]
