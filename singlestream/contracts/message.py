"""The base of every message: immutable, closed to unknown fields, with no NaN or infinity in its numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LEASE_ID_PATTERN = r"^(train|estimate|evaluate):[0-9a-f]{8}:[1-9][0-9]*$"

LeaseId = Annotated[str, Field(pattern=LEASE_ID_PATTERN)]
"""``purpose:epoch:n``, for example ``train:5f3a9c01:17``.

The epoch is drawn at each start of the value store; n counts from 1 within purpose and epoch.
"""

Reward = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
"""A finite number in [0, 1] (docs/design.md, I10)."""


class Message(BaseModel):
    """Base of the wire's messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def lease_id(purpose: str, epoch: str, n: int) -> str:
    """Write a lease number the way the wire carries it."""
    return f"{purpose}:{epoch}:{n}"


def parse_lease_id(text: str) -> tuple[str, str, int]:
    """Return ``(purpose, epoch, n)`` of a valid `LeaseId`."""
    purpose, epoch, n = text.split(":")
    return purpose, epoch, int(n)
