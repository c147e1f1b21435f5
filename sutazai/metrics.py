"""The declarations of the metrics: names, labels and buckets.

Labels are bounded by construction: agents, route templates and status codes, never anything that
a client chooses.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

UNMATCHED = "unmatched"
"""The route label of requests for addresses that do not exist."""

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class FrontMetrics:
    """What one front counts, in a registry of its own."""

    def __init__(self, agent: str) -> None:
        self.registry = CollectorRegistry()
        self._agent = agent
        self._requests = Counter(
            "agent_requests_total",
            "Requests answered.",
            ["agent_id", "endpoint"],
            registry=self.registry,
        )
        self._durations = Histogram(
            "agent_request_duration_seconds",
            "Seconds until a request was answered; waiting for a task counts.",
            ["agent_id", "endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._answers = Counter(
            "sutazai_http_requests_total",
            "Requests answered, by status code.",
            ["agent", "route", "code"],
            registry=self.registry,
        )
        self._health = Gauge(
            "agent_health_status",
            "1 when the agent is healthy, else 0.",
            ["agent_id"],
            registry=self.registry,
        ).labels(agent)
        self._children: dict[tuple[str, int], tuple[Counter, Histogram, Counter]] = {}

    def observe(self, route: str, code: int, seconds: float) -> None:
        """Count one answered request."""
        children = self._children.get((route, code))
        if children is None:
            children = (
                self._requests.labels(self._agent, route),
                self._durations.labels(self._agent, route),
                self._answers.labels(self._agent, route, str(code)),
            )
            self._children[route, code] = children
        requests, durations, answers = children
        requests.inc()
        durations.observe(seconds)
        answers.inc()

    def set_healthy(self, healthy: bool) -> None:
        """Record what the last check of the agent's health said."""
        self._health.set(int(healthy))
