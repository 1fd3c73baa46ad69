"""Prometheus metrics of one replica."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from singlestream.contracts import Trajectory
from singlestream.telemetry import METRIC_PREFIX

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SMALL = (0, 1, 2, 3, 4, 6, 8, 12, 16)


class Metrics:
    """Every metric that a replica writes, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.tool_calls = self._counter("tool_calls_total", "Code blocks run, by the sandbox's status", ["status"])
        self.tool_faults = self._counter("tool_faults_total", "Calls that the sandbox itself failed")
        self.tool_seconds = self._histogram("tool_seconds", "Request to result of one code block", SECONDS)
        self.episodes = self._counter("episodes_total", "Episodes that ended, by reason", ["purpose", "end"])
        self.failed = self._counter("failed_total", "Leases that ended without a trajectory, by reason", ["reason"])
        self.handed_over = self._counter("handed_over_total", "Leases put back, by cause", ["cause"])
        self.lost = self._counter("lost_total", "Episodes cancelled because their lease was taken away")
        self.claimed = self._counter("claimed_total", "Leases of silent replicas that were put back or failed")
        self.reward = self._histogram("reward", "Reward of an episode", (0.0, 0.25, 0.5, 0.75, 1.0))
        self.response_tokens = self._histogram("response_tokens", "Tokens after the prompt", TOKENS)
        self.action_tokens = self._counter("action_tokens_total", "Sampled tokens of emitted trajectories")
        self.generation_seconds = self._histogram("generation_seconds", "Request to end of one model turn", SECONDS)
        self.sampled_tokens = self._counter("sampled_tokens_total", "Tokens that the engine sampled")
        self.engine_running = self._gauge("engine_running", "Requests in the engine's batch")
        self.engine_waiting = self._gauge("engine_waiting", "Requests that wait for room in the engine")
        self.kv_cache = self._gauge("kv_cache_ratio", "Share of the KV cache in use")
        self.preemptions = self._counter("preemptions_total", "Requests put out of the batch for want of KV cache")
        self.prefix_queries = self._counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = self._counter("prefix_cache_hits_total", "Prompt tokens found there")
        self.turns = self._histogram("turns", "Model turns of an episode", SMALL)
        self.versions = self._histogram("policy_versions_per_trajectory", "Policies that sampled it", SMALL)
        self.episode_seconds = self._histogram("episode_seconds", "Taken to graded, less its lease's waits", SECONDS)
        self.slots = self._gauge("slots", "Episodes that may run at a time")
        self.in_use = self._gauge("slots_in_use", "Episodes that run")
        self.version = self._gauge("policy_version", "Version of the loaded weights")
        self.lineage = self._gauge("policy_lineage", "Lineage of the loaded weights")
        self.updates = self._counter("weight_updates_total", "Weight updates, by outcome", ["outcome"])
        self.skipped = self._counter("weight_versions_skipped_total", "Versions passed over for a newer one")
        self.pause_seconds = self._histogram("weight_update_pause_seconds", "Generation stood still", SECONDS)
        self.load_seconds = self._histogram("weight_update_seconds", "Announcement read to weights loaded", SECONDS)
        self.fetches = self._counter("weight_fetches_total", "Versions fetched over HTTP: full or delta", ["kind"])
        self.fetched_bytes = self._counter("weight_fetched_bytes_total", "Bytes of them on the wire", ["kind"])
        self.fetch_seconds = self._histogram("weight_fetch_seconds", "First request to checked file", SECONDS)
        self.redis_retries = self._counter("redis_retries_total", "Redis was away, by what was tried", ["what"])

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"{METRIC_PREFIX}_rollout_{name}", text, labels or [], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{METRIC_PREFIX}_rollout_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{METRIC_PREFIX}_rollout_{name}", text, buckets=buckets, registry=self.registry)

    def observe(self, purpose: str, trajectory: Trajectory) -> None:
        """Count an emitted trajectory."""
        generated = [segment for segment in trajectory.segments if segment.kind == "generated"]
        self.episodes.labels(purpose, trajectory.end_reason).inc()
        self.reward.observe(trajectory.reward)
        self.response_tokens.observe(sum(len(segment.token_ids) for segment in trajectory.segments[1:]))
        self.action_tokens.inc(trajectory.action_tokens)
        self.turns.observe(trajectory.turns)
        self.versions.observe(len({(segment.version, segment.lineage) for segment in generated}))
        self.episode_seconds.observe(max(0.0, trajectory.finished_at_s - trajectory.started_at_s))
