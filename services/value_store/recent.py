"""What the store has seen lately: kept for the page, in memory only, and gone with the process."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.value_store.receipts import Receipts
from services.value_store.table import Table
from services.value_store.trajectories import LastTrajectories

EVIDENCE_KEPT = 1024
"""Trajectories behind the means: a few steps of training."""
SNAPSHOT_EVERY_S = 5.0
SNAPSHOTS_KEPT = 720
"""An hour of histograms."""
BINS = 20


@dataclass
class Queues:
    """Lengths of the streams when they were last read."""

    unread_leases: int = 0
    held_leases: int = 0
    trajectories: int = 0
    posterior_updates: int = 0
    results: int = 0
    dead_letters: int = 0
    read_at_s: float = 0.0


@dataclass
class Recent:
    """Means of the last evidence, histograms of v̂ over time, queues, and the learner's own words."""

    rho: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """ρ of the last batch of updates."""
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=EVIDENCE_KEPT))
    staleness: deque[int] = field(default_factory=lambda: deque(maxlen=EVIDENCE_KEPT))
    snapshots: deque[tuple[float, list[int]]] = field(default_factory=lambda: deque(maxlen=SNAPSHOTS_KEPT))
    """(Unix time, counts of v̂ in `BINS` equal bins)."""
    queues: Queues = field(default_factory=Queues)
    oldest_s: dict[str, float] = field(default_factory=dict)
    """Queue → age of its oldest entry in seconds, 0 where none waits; as old as ``queues``."""
    trajectories: LastTrajectories = field(default_factory=LastTrajectories)
    learner: dict[str, object] | None = None
    """The learner's heartbeat: step, state, waiting_for, at_s; None where it has sent none.

    ``at_s`` is when it came in, by this store's clock.
    """
    _heartbeats: Receipts = field(default_factory=Receipts)

    def add(self, rho: NDArray[np.float64], rewards: NDArray[np.float64], staleness: NDArray[np.int64]) -> None:
        """Note a batch of updates."""
        if len(rho):
            self.rho = rho
            self.rewards.extend(rewards[-EVIDENCE_KEPT:].tolist())
            self.staleness.extend(staleness[-EVIDENCE_KEPT:].tolist())

    def hear_learner(self, heartbeat: dict[str, object] | None, now_s: float) -> None:
        """Note the learner's heartbeat as it stands in Redis."""
        said_s = (heartbeat or {}).get("at_s")
        came_s = self._heartbeats.note({"learner": said_s} if isinstance(said_s, int | float) else {}, now_s)
        self.learner = heartbeat and {**heartbeat, "at_s": came_s.get("learner")}

    def mean_reward(self, count: int) -> float | None:
        """Mean of the last ``count`` rewards, as far as they are kept; None before the first."""
        last = list(self.rewards)[-count:]
        return sum(last) / len(last) if last else None

    def snapshot(self, now_s: float, table: Table) -> None:
        """Note the histogram of v̂, at most every `SNAPSHOT_EVERY_S`: only then is it computed, for all rows."""
        if len(table) and (not self.snapshots or now_s - self.snapshots[-1][0] >= SNAPSHOT_EVERY_S):
            self.snapshots.append((now_s, count_values(table.v_hat)))


def count_values(v_hat: NDArray[np.float64]) -> list[int]:
    """Histogram of v̂, [P], in `BINS` equal bins over [0, 1]."""
    counts: list[int] = np.bincount(np.minimum((v_hat * BINS).astype(np.int64), BINS - 1), minlength=BINS).tolist()
    return counts
