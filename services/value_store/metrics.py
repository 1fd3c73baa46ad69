"""Prometheus metrics, computed from memory when they are asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from services.value_store import issuing, sampler, views
from services.value_store.memory import Memory
from services.value_store.store import NotReady, Store
from singlestream.telemetry import METRIC_PREFIX

_PREFIX = f"{METRIC_PREFIX}_value_store"
_V_HAT = tuple(i / 10 for i in range(11))
_N_EFF = tuple(float(i) for i in range(0, 28, 2))


class _Collector:
    def __init__(self, store: Store) -> None:
        self.store = store

    def collect(self) -> Iterable[Metric]:
        store = self.store
        yield GaugeMetricFamily(f"{_PREFIX}_ready", "1 while the store can write.", float(store.waiting_for is None))
        yield CounterMetricFamily(f"{_PREFIX}_rebuilds", "Times memory was read from Redis.", store.rebuilds)
        try:
            memory = store.memory
        except NotReady:  # before the first read there is nothing more to say
            return
        text = "1 once training has ended: finished, or stopped with no lease left to the learner."
        yield GaugeMetricFamily(f"{_PREFIX}_finished", text, float(memory.training_ended))
        yield from _leases(memory)
        yield from _posterior(store, memory)
        yield from _recent(store)
        now_s = time.time()
        alive = [replica for replica in store.replicas if replica.alive(now_s)]
        yield GaugeMetricFamily(f"{_PREFIX}_replicas", "Replicas that reported within 10 s.", len(alive))
        yield GaugeMetricFamily(f"{_PREFIX}_slots", "Slots of the living replicas.", sum(r.slots for r in alive))


def _recent(store: Store) -> Iterable[Metric]:
    recent = store.recent
    lag = GaugeMetricFamily(f"{_PREFIX}_stream_entries", "Entries of each stream, a second ago.", labels=["stream"])
    for name in ("trajectories", "posterior_updates", "results", "dead_letters", "unread_leases", "held_leases"):
        lag.add_metric([name], getattr(recent.queues, name))
    yield lag
    oldest = GaugeMetricFamily(f"{_PREFIX}_stream_oldest_seconds", "Age of the oldest entry.", labels=["stream"])
    for name, age_s in recent.oldest_s.items():
        oldest.add_metric([name], age_s)
    yield oldest
    if recent.rewards:
        mean = sum(recent.rewards) / len(recent.rewards)
        yield GaugeMetricFamily(f"{_PREFIX}_reward_mean", "Mean reward of the last 1,024 trajectories counted.", mean)
        stale = sum(recent.staleness) / len(recent.staleness)
        yield GaugeMetricFamily(f"{_PREFIX}_staleness_mean_versions", "Mean staleness of the same.", stale)


def _leases(memory: Memory) -> Iterable[Metric]:
    leased = CounterMetricFamily(f"{_PREFIX}_leased", "Leases issued.", labels=["purpose"])
    ended = CounterMetricFamily(f"{_PREFIX}_ended", "Leases ended, by outcome.", labels=["purpose", "outcome"])
    outstanding = GaugeMetricFamily(f"{_PREFIX}_outstanding_leases", "Leases not ended.", labels=["purpose"])
    for purpose, counts in memory.ledger().items():
        leased.add_metric([purpose], counts.leased)
        outstanding.add_metric([purpose], counts.outstanding)
        for outcome, count in counts.ended.items():
            ended.add_metric([purpose, outcome], count)
    yield from (leased, ended, outstanding)
    headroom = memory.admission.headroom
    yield GaugeMetricFamily(f"{_PREFIX}_admission_headroom_leases", "Training leases admitted now.", headroom)
    yield CounterMetricFamily(f"{_PREFIX}_duplicates", "Closings that named no outstanding lease.", memory.duplicates)
    dropped = CounterMetricFamily(f"{_PREFIX}_dropped", "Records beyond their bound, oldest first.", labels=["what"])
    dropped.add_metric(["dead_letters"], memory.dead_letters_dropped)
    dropped.add_metric(["jobs"], memory.jobs_dropped)
    yield dropped
    on_clock = "Updates under kl retention that went by the drift clock for want of an anchor, since this start."
    yield CounterMetricFamily(f"{_PREFIX}_kl_on_clock", on_clock, memory.on_clock)


def _posterior(store: Store, memory: Memory) -> Iterable[Metric]:
    table, visits = memory.table, int(memory.table.visits.sum(dtype=np.int64))
    visited = int(np.count_nonzero(table.visits))
    yield GaugeMetricFamily(f"{_PREFIX}_prompts", "Prompts in the table.", len(table))
    yield CounterMetricFamily(f"{_PREFIX}_visits", "Leases counted in posteriors.", visits)
    yield GaugeMetricFamily(f"{_PREFIX}_visited_ratio", "Prompts with visits.", visited / max(1, len(table)))
    yield _histogram("v_hat", "Posterior means.", table.v_hat, _V_HAT)
    yield _histogram("n_eff_observations", "Observations behind each posterior now.", _n_eff(store), _N_EFF)
    weight = issuing.training_weights(memory, store.config.value_store, store.retention)
    effective = math.exp(sampler.entropy(weight)) if weight.any() else 0.0
    text = "e^H of the next draw: as many prompts, drawn alike, would be as hard to foretell."
    yield GaugeMetricFamily(f"{_PREFIX}_sampling_effective_prompts", text, effective)
    yield GaugeMetricFamily(f"{_PREFIX}_drift_clock", "z of the version published last.", memory.clock.now)
    if memory.newest is not None:
        yield GaugeMetricFamily(f"{_PREFIX}_policy_version", "Version published last.", memory.newest.version)
        yield GaugeMetricFamily(f"{_PREFIX}_drift_step_nats", "Its mean |Δ log p|.", memory.newest.drift)
    if memory.calibration.brier is not None:
        yield GaugeMetricFamily(f"{_PREFIX}_brier", "Mean of (reward − v̂ at the lease)².", memory.calibration.brier)
    if memory.calibration.error is not None:
        text = "Mean |reward − v̂ at the lease| of ten bins of v̂, weighted by their evidence."
        yield GaugeMetricFamily(f"{_PREFIX}_calibration_error", text, memory.calibration.error)
    if len(rho := store.recent.rho):
        settings = store.config.value_store
        clipped = np.mean((rho <= settings.rho_min) | (rho >= settings.rho_max))
        yield GaugeMetricFamily(f"{_PREFIX}_rho_mean", "Mean ρ of the last batch of updates.", float(rho.mean()))
        yield GaugeMetricFamily(f"{_PREFIX}_rho_clip_ratio", "Share of it at the floor or ceiling.", float(clipped))


def _n_eff(store: Store) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return views.faded_n_eff(store.memory, store.retention)


def _histogram(
    name: str, text: str, values: np.ndarray[tuple[int], np.dtype[np.float64]], edges: tuple[float, ...]
) -> Metric:
    counts = np.cumsum([bar.count for bar in views.histogram(values, edges)])
    buckets = [(str(edge), float(count)) for edge, count in zip(edges[1:-1], counts[:-1], strict=True)]
    buckets.append(("+Inf", float(len(values))))
    return HistogramMetricFamily(f"{_PREFIX}_{name}", text, buckets=buckets, sum_value=float(values.sum()))


def render(store: Store) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(store))
    return generate_latest(registry)
