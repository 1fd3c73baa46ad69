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

MAX_VERSION = 2**31 - 1
"""Greatest policy version: the value store keeps 4 bytes of it a prompt."""


class Message(BaseModel):
    """Base of the wire's messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def lease_id(purpose: str, epoch: str, n: int) -> str:
    """Write a lease number the way the wire carries it."""
    return f"{purpose}:{epoch}:{n}"


def group_of(lease_id: str, size: int) -> str:
    """Group of a training lease where ``size`` leases of one prompt are issued at once.

    A group's numbers follow each other: 1 … size, size + 1 … 2 · size, and so on within an epoch. So whatever names
    its lease names its group, a tombstone or a damaged trajectory too. With ``size`` 1 each lease is its own group.
    """
    _, epoch, n = parse_lease_id(lease_id)
    return f"{epoch}:{(n - 1) // size + 1}"


def parse_lease_id(text: str) -> tuple[str, str, int]:
    """Return ``(purpose, epoch, n)`` of a valid `LeaseId`."""
    purpose, epoch, n = text.split(":")
    return purpose, epoch, int(n)
