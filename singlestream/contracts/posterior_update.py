"""The learner's word on a lease: what became of it, and the evidence for the prompt's posterior."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from singlestream.contracts.message import MAX_VERSION, LeaseId, Message, Reward

Outcome = Literal["trained", "stale", "failed", "scored", "cancelled"]
"""Every end a lease can come to (I1)."""

EVIDENCE: tuple[Outcome, ...] = ("trained", "stale")
"""Ends that count in the posterior."""


class PosteriorUpdate(Message):
    """Closes one lease. Applied if and only if that lease is outstanding and names that prompt (I2).

    Example::

        PosteriorUpdate(lease_id="train:5f3a9c01:17", prompt_id="a1b2", outcome="trained", reward=1.0, version=4)
    """

    lease_id: LeaseId
    prompt_id: str
    """The prompt that the lease names; empty for a failed lease too damaged to say."""
    outcome: Outcome
    reward: Reward | None = None
    """Required for ``trained`` and ``stale``; None otherwise."""
    version: int | None = Field(default=None, ge=0, le=MAX_VERSION)
    """Policy version of the trajectory's last generated segment: the coordinate of this evidence on the drift clock."""
    kl: float | None = Field(default=None, ge=0.0)
    """Mean |Δ log p| on the prompt's previous response, for ``kl`` retention; None where it was not measured."""

    @model_validator(mode="after")
    def _evidence(self) -> Self:
        is_evidence = self.outcome in EVIDENCE
        if {is_evidence} != {self.reward is not None, self.version is not None}:
            raise ValueError(f"outcome {self.outcome!r} {'needs' if is_evidence else 'takes no'} reward and version")
        return self
