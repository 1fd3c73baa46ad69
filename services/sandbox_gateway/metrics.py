"""Prometheus metrics of the gateway; docs/sandbox.md says what a healthy value looks like."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_RUN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_QUEUE_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """All of them, in a registry of their own, so that two gateways in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """What ``/metrics`` shows."""
        registry, prefix = self.registry, "singlestream_sandbox"
        self.runs = Counter(f"{prefix}_runs", "Runs that had an outcome", ["status"], registry=registry)
        """By status of the result."""
        self.truncated = Counter(
            f"{prefix}_truncated", "Outputs longer than a result may carry", ["stream"], registry=registry
        )
        """By ``stdout`` and ``stderr``; the result says so too, and holds the first and the last of it."""
        self.faults = Counter(f"{prefix}_faults", "Requests that ended without an outcome", ["code"], registry=registry)
        """By problem code; ``disconnected`` where the caller went away."""
        self.run_s = Histogram(f"{prefix}_run_seconds", "Wall time of runs", buckets=_RUN_BUCKETS, registry=registry)
        """From start to end of the run's process."""
        self.queue_s = Histogram(
            f"{prefix}_queue_seconds", "Time spent waiting for a slot", buckets=_QUEUE_BUCKETS, registry=registry
        )
        """Of requests that got a slot."""
        self.kill_overshoot_s = Histogram(
            f"{prefix}_kill_overshoot_seconds",
            "How late runs ended after their time-out",
            buckets=_QUEUE_BUCKETS,
            registry=registry,
        )
        """Large values mean an overloaded machine."""
        self.slots = Gauge(f"{prefix}_slots", "Slots in total", registry=registry)
        """Constant."""
        self.used_slots = Gauge(f"{prefix}_used_slots", "Slots held by running requests", registry=registry)
        """At ``slots`` the gateway is saturated."""
        self.queued = Gauge(f"{prefix}_queued", "Requests waiting for a slot", registry=registry)
        """At its bound, requests get 429."""
        self.zygote_starts = Counter(
            f"{prefix}_zygote_starts", "Zygotes started", ["kind", "reason"], registry=registry
        )
        """``reason`` is first, recycle or died; the last should stay at 0."""
        self.ready = Gauge(f"{prefix}_ready", "1 while requests are taken", registry=registry)
        """0 while draining or without a zygote."""

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
