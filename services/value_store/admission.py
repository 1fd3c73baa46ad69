"""Admission: how many training leases may be issued now (docs/design.md, I4).

A pure state machine, without clock or client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from singlestream.contracts import Outcome

TRAINING_ENDS: tuple[Outcome, ...] = ("trained", "stale", "failed", "cancelled")

Bound = Literal["run-ahead", "total"]


@dataclass
class Admission:
    """Counts of training leases, and the two bounds on them.

    Both bounds are read from counts alone, never from a policy version: ``outstanding ≤ (max_staleness + 1) · batch``
    and
    ``leased − stale − failed − cancelled ≤ total_steps · batch``. Every end of a lease returns its slot. Where leases
    are issued in groups, those that a group has lost are not made up for, since the learner trains what is left of it:
    then the second bound is ``leased ≤ total_steps · batch``.

    Args:
        train_batch_size: trajectories of an optimizer step.
        max_staleness: updates that generation may run ahead; 0 is synchronous training.
        total_steps: optimizer steps of the run.
        group_size: leases issued at once for one prompt; divides the batch.
        leased: training leases ever issued.
        ended: how many of them ended, by outcome.
    """

    train_batch_size: int
    max_staleness: int
    total_steps: int
    group_size: int = 1
    leased: int = 0
    ended: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(TRAINING_ENDS, 0))

    @property
    def outstanding(self) -> int:
        """Training leases that have not ended."""
        return self.leased - sum(self.ended.values())

    @property
    def run_ahead_headroom(self) -> int:
        """Leases that the run-ahead bound still admits, ≥ 0."""
        return max(0, (self.max_staleness + 1) * self.train_batch_size - self.outstanding)

    @property
    def total_headroom(self) -> int:
        """Leases that the length of the run still admits, ≥ 0."""
        lost = 0 if self.group_size > 1 else sum(self.ended[end] for end in ("stale", "failed", "cancelled"))
        return max(0, self.total_steps * self.train_batch_size - (self.leased - lost))

    @property
    def headroom(self) -> int:
        """Leases that may be issued now: whole groups, ≥ 0."""
        return min(self.run_ahead_headroom, self.total_headroom) // self.group_size * self.group_size

    @property
    def binding(self) -> Bound | None:
        """The bound that admits nothing now; None where something may be issued."""
        if self.total_headroom < self.group_size:
            return "total"
        return "run-ahead" if self.run_ahead_headroom < self.group_size else None

    @property
    def finished(self) -> bool:
        """Whether every trajectory of the run has been trained on."""
        return self.completed(self.ended) >= self.total_steps * self.train_batch_size

    def completed(self, ended: Mapping[Outcome, int]) -> int:
        """Of training leases that ended, those that count towards the length of the run."""
        outcomes = TRAINING_ENDS if self.group_size > 1 else ("trained",)
        return sum(ended.get(outcome, 0) for outcome in outcomes)

    def issue(self, count: int) -> None:
        """Count leases as issued. Raises ValueError beyond `headroom`: the caller has broken the rule."""
        admitted = min(self.run_ahead_headroom, self.total_headroom)
        if count > admitted:
            raise ValueError(f"{count} leases issued where {admitted} are admitted")
        self.leased += count

    def end(self, outcome: Outcome, count: int = 1) -> None:
        """Count leases as ended.

        Raises ValueError for an outcome no training lease has, or beyond what is outstanding.
        """
        if outcome not in TRAINING_ENDS:
            raise ValueError(f"a training lease cannot end as {outcome!r}")
        if count > self.outstanding:
            raise ValueError(f"{count} leases ended where {self.outstanding} are outstanding")
        self.ended[outcome] += count
