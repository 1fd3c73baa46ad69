"""A lease: the right and the duty to run one episode of one prompt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from singlestream.contracts.message import LeaseId, Message
from singlestream.contracts.trajectory import Segment, ToolCall

Purpose = Literal["train", "estimate", "evaluate"]


class Sampling(Message):
    """How the engine samples. Training uses temperature 1 and top-p 1 (docs/spo.md)."""

    temperature: float = Field(ge=0.0)
    """0 means greedy."""
    top_p: float = Field(gt=0.0, le=1.0)
    top_k: int = Field(ge=0)
    """0 means no limit."""


class Progress(Message):
    """An unfinished episode, as one replica hands it to the next."""

    segments: list[Segment]
    """Tokens so far; the last may be a generated segment cut in the middle of a turn."""
    turns: int = Field(ge=0)
    """Model turns finished."""
    tool_calls: list[ToolCall]
    started_at_s: float
    """Unix time at which the first attempt took the lease, later by what it has waited for a replica since."""


class Lease(Message):
    """One episode to run.

    Example::

        Lease(lease_id="train:5f3a9c01:17", prompt_id="a1b2", question="47*91=?", answer="4277",
              source="multiply", environment="math_python", v_hat=0.4, version=4, lineage=1,
              sampling=Sampling(temperature=1, top_p=1, top_k=0), issued_at_s=1.7e9)
    """

    lease_id: LeaseId
    prompt_id: str
    question: str
    """The task's text, without any chat template."""
    answer: str
    """Ground truth for the grader."""
    source: str = "default"
    """Data set that the prompt came from, as it was posted."""
    environment: str
    """Name of the environment that runs and grades it."""
    v_hat: float = Field(gt=0.0, lt=1.0)
    """Baseline frozen at issue (I5)."""
    version: int = Field(ge=0)
    """Newest policy version at issue; no replica starts the lease on an older one of that lineage."""
    lineage: int = Field(default=0, ge=0)
    """Lineage of that version.

    After a learner went back to its checkpoint, weights of a later lineage will do, whatever
    their version: the version asked for may not exist again before this very lease is trained."""
    sampling: Sampling
    job: str | None = None
    """Estimation or evaluation job; None for training."""
    pinned: bool = False
    """Whether exactly (version, lineage) must sample every token: only a replica that holds it for the job may start
    this."""
    attempts: int = Field(default=0, ge=0)
    """Replicas that took it before."""
    progress: Progress | None = None
    """What an earlier replica handed over; None to start afresh."""
    issued_at_s: float
    """Unix time of issue."""

    @property
    def purpose(self) -> Purpose:
        """The first part of the lease's number."""
        return self.lease_id.split(":", 1)[0]  # type: ignore[return-value]
