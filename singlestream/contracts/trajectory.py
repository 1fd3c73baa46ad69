"""What a rollout makes of a lease: a trajectory of segments, or a tombstone."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from singlestream.contracts.arrays import FloatArray, IntArray
from singlestream.contracts.message import MAX_VERSION, LeaseId, Message, Reward

EndReason = Literal["stop", "length", "max_turns", "deadline"]
"""Why an episode ended: the model stopped, ran out of tokens, of turns, or of wall time."""

FailReason = Literal["tool_unavailable", "attempts", "grader_error", "malformed", "cancelled"]
"""Why a lease ended without a trajectory."""

MAX_ANSWER_CHARS = 200
"""A longer answer votes with its beginning."""


class Segment(Message):
    """A run of tokens with one origin. The loss mask and the policy versions are read from segments alone (I6, I7).

    Example: ``Segment(kind="generated", token_ids=[5, 7], logprobs=[-0.1, -2.0], version=3, lineage=1, replica="r1")``
    """

    kind: Literal["prompt", "generated", "observation"]
    """Who wrote the tokens: the task, the policy, or a tool."""
    token_ids: IntArray
    """[T] token ids, in order."""
    logprobs: FloatArray | None = None
    """[T] natural log-probabilities under the sampling distribution (temperature included); only for ``generated``."""
    version: int | None = Field(default=None, ge=0, le=MAX_VERSION)
    """Policy version that sampled every token of this segment; only for ``generated``."""
    lineage: int | None = Field(default=None, ge=0)
    """Which start of the learner made that version; only for ``generated``."""
    replica: str | None = None
    """Rollout replica that sampled the tokens; only for ``generated``."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        generated = (self.logprobs, self.version, self.lineage, self.replica)
        if self.kind == "generated":
            if any(field is None for field in generated):
                raise ValueError("a generated segment carries logprobs, version, lineage and replica")
            assert self.logprobs is not None  # noqa: S101  for the type checker
            if len(self.logprobs) != len(self.token_ids):
                raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} logprobs")
            if not np.isfinite(self.logprobs).all():
                raise ValueError("logprobs must be finite")
        elif any(field is not None for field in generated):
            raise ValueError(f"a segment of kind {self.kind!r} carries tokens only")
        return self


class ToolCall(Message):
    """One execution of one code block."""

    turn: int = Field(ge=0)
    """Model turn that asked for it, from 0."""
    status: str
    """The sandbox's status: ok, error, timeout, memory_limit, output_limit or killed."""
    wall_s: float = Field(ge=0)
    """Seconds from request to result."""


class Trajectory(Message):
    """A finished, graded episode.

    Example: a prompt of three tokens, one model turn, a tool's answer, a second turn sampled by a newer version::

        Trajectory(lease_id="train:5f3a9c01:17", prompt_id="a1b2", v_hat=0.4, reward=1.0, end_reason="stop",
                   segments=[Segment(kind="prompt", token_ids=[1, 2, 3]),
                             Segment(kind="generated", token_ids=[8, 9], logprobs=[-.1, -.2], version=4, lineage=1,
                                     replica="r1"),
                             Segment(kind="observation", token_ids=[6]),
                             Segment(kind="generated", token_ids=[7], logprobs=[-.3], version=5, lineage=1,
                                     replica="r1")], ...)
    """

    lease_id: LeaseId
    prompt_id: str
    """The prompt that the lease names."""
    job: str | None = None
    """The estimation or evaluation job that asked for it; None for training."""
    segments: list[Segment] = Field(min_length=2)
    """In order; the first is the prompt, and at least one is generated."""
    reward: Reward
    v_hat: float = Field(gt=0.0, lt=1.0)
    """The baseline frozen when the lease was issued (I5); in (0, 1)."""
    answer: str | None = Field(default=None, max_length=MAX_ANSWER_CHARS)
    """What the model boxed last, for the votes of maj@k, cut to its bound; None without a box, and for training."""
    end_reason: EndReason
    turns: int = Field(ge=1)
    """Model turns."""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    attempts: int = Field(ge=1)
    """How many replicas started this lease, this one included."""
    started_at_s: float
    """Unix time at which the first attempt took the lease, later by what it has waited for a replica since."""
    finished_at_s: float
    """Unix time at which the episode was graded."""

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.segments[0].kind != "prompt" or not any(s.kind == "generated" for s in self.segments):
            raise ValueError("a trajectory starts with its prompt and has at least one generated segment")
        return self

    @property
    def action_tokens(self) -> int:
        """Number of generated tokens, masks not applied."""
        return sum(len(s.token_ids) for s in self.segments if s.kind == "generated")

    @property
    def first_version(self) -> int:
        """Policy version of the first generated segment."""
        return next(s.version for s in self.segments if s.version is not None)

    @property
    def last_version(self) -> int:
        """Policy version of the last generated segment."""
        return next(s.version for s in reversed(self.segments) if s.version is not None)


class Tombstone(Message):
    """A lease that ended without a trajectory; it stands in the trajectory stream so that nothing waits for it."""

    lease_id: LeaseId
    prompt_id: str
    job: str | None = None
    reason: FailReason
    detail: str = Field(max_length=20_000)
    """The error's text or traceback."""
    attempts: int = Field(ge=0)


class EndOfRun(Message):
    """The value store will issue no more training leases and none is outstanding; the learner trains what it has."""

    reason: str
