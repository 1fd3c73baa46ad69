"""Which stream entries make the next train batch: a pure state machine, with no client and no clock in it.

What it decides depends on its position, the entries in stream order and the learner's step alone, so a resumed learner
makes the same batches again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from singlestream.contracts import EndOfRun, Message, PosteriorUpdate, Tombstone, Trajectory, parse_lease_id
from singlestream.contracts.message import LEASE_ID_PATTERN

_LEASE_ID = re.compile(LEASE_ID_PATTERN)
_TRAINING = "train:"


class ConsumedLeases:
    """Lease numbers that are done with: for each epoch a low-water mark (all up to it) and the numbers above it."""

    def __init__(self, epochs: dict[str, tuple[int, set[int]]] | None = None) -> None:
        self._epochs = epochs or {}

    def __contains__(self, lease_id: str) -> bool:
        _, epoch, n = parse_lease_id(lease_id)
        low, above = self._epochs.get(epoch, (0, set()))
        return n <= low or n in above

    def add(self, lease_id: str) -> None:
        """Mark a lease; the mark rises over every gap that closes."""
        if lease_id in self:
            return
        _, epoch, n = parse_lease_id(lease_id)
        low, above = self._epochs.get(epoch, (0, set()))
        above.add(n)
        while low + 1 in above:
            low += 1
            above.remove(low)
        self._epochs[epoch] = (low, above)

    def copy(self) -> ConsumedLeases:
        """An independent copy."""
        return ConsumedLeases({epoch: (low, set(above)) for epoch, (low, above) in self._epochs.items()})

    def to_json(self) -> dict[str, Any]:
        """``{epoch: [low-water mark, [numbers above it]]}``."""
        return {epoch: [low, sorted(above)] for epoch, (low, above) in sorted(self._epochs.items())}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConsumedLeases:
        """The inverse of `to_json`."""
        return cls({epoch: (int(low), set(map(int, above))) for epoch, (low, above) in data.items()})


@dataclass(frozen=True)
class Position:
    """Where the learner stands in the trajectory stream after a whole batch: what a checkpoint keeps.

    Args:
        cursor: last entry that is consumed; ``0-0`` before the first.
        consumed: leases trained, stale or failed.
        ended: the end marker is behind the cursor.
    """

    cursor: str = "0-0"
    consumed: ConsumedLeases = field(default_factory=ConsumedLeases)
    ended: bool = False


class Verdict(Enum):
    """What becomes of one stream entry."""

    TRAINABLE = "trainable"
    DUPLICATE = "duplicate"
    FAILED = "failed"
    MALFORMED = "malformed"
    STALE = "stale"
    END = "end"


@dataclass(frozen=True)
class Decision:
    """A verdict, and what the caller must do at once.

    Args:
        verdict: what the entry is.
        update: posterior update to send now (stale, or malformed with a known lease).
        dead_letter: reason with which the entry goes to the dead letters; None where it does not.
    """

    verdict: Verdict
    update: PosteriorUpdate | None = None
    dead_letter: str | None = None


class BatchAssembler:
    """Collects exactly ``batch_size`` trainable trajectories, in stream order.

    Args:
        batch_size: trajectories of a batch.
        staleness_bound: a trajectory whose generated segments are all older than this many updates is stale (I11).
        position: where to go on from.

    Example: ``offer`` entries until ``complete``, train `batch`, then `commit`.
    """

    def __init__(self, batch_size: int, staleness_bound: int, position: Position) -> None:
        self.batch_size, self.staleness_bound = batch_size, staleness_bound
        self.position = position
        self._begin()

    def _begin(self) -> None:
        self.batch: list[tuple[Trajectory, bytes]] = []
        self.counts = dict.fromkeys(Verdict, 0)
        self._cursor = self.position.cursor
        self._consumed = self.position.consumed.copy()
        self._ended = self.position.ended

    @property
    def ended(self) -> bool:
        """Whether the end marker was met: no further entry will come."""
        return self._ended

    @property
    def complete(self) -> bool:
        """Whether the batch is full, or the run has ended and this is the remainder (which may be empty)."""
        return self._ended or len(self.batch) == self.batch_size

    def offer(self, entry: str, number: str, message: Message | None, raw: bytes, error: str, step: int) -> Decision:
        """Take the next entry of the stream.

        Args:
            entry: its id.
            number: the lease number that the entry itself carries; may be empty.
            message: the decoded message; None where it could not be decoded.
            raw: the message's bytes.
            error: why it could not be decoded.
            step: optimizer steps behind the weights that this batch will train.

        Raises:
            ValueError: the batch is complete; train it and `commit` first.
        """
        if self.complete:
            raise ValueError("the batch is complete: commit it before the next entry")
        self._cursor = entry
        decision = self._decide(number, message, raw, error, step)
        self.counts[decision.verdict] += 1
        return decision

    def _decide(self, number: str, message: Message | None, raw: bytes, error: str, step: int) -> Decision:
        if isinstance(message, EndOfRun):
            self._ended = True
            return Decision(Verdict.END)
        if isinstance(message, Trajectory | Tombstone):
            number = message.lease_id
        known = number.startswith(_TRAINING) and _LEASE_ID.match(number) is not None
        if known and number in self._consumed:
            return Decision(Verdict.DUPLICATE)
        if known:
            self._consumed.add(number)
        if isinstance(message, Tombstone):
            return Decision(Verdict.FAILED)
        if not isinstance(message, Trajectory):
            reason = error or f"a {type(message).__name__} does not belong in the trajectory stream"
            update = PosteriorUpdate(lease_id=number, prompt_id="", outcome="failed") if known else None
            return Decision(Verdict.MALFORMED, update, reason)
        if not self._trainable(message, step):
            return Decision(Verdict.STALE, closing(message, "stale"))
        self.batch.append((message, raw))
        return Decision(Verdict.TRAINABLE)

    def _trainable(self, trajectory: Trajectory, step: int) -> bool:
        return any(
            len(segment.token_ids) > 0 and max(0, step - segment.version) <= self.staleness_bound
            for segment in trajectory.segments
            if segment.version is not None
        )

    def upcoming(self, messages: Iterable[Message | None]) -> list[Trajectory]:
        """Trajectories among messages beyond the cursor that no finished lease stands behind; changes nothing."""
        return [one for one in messages if isinstance(one, Trajectory) and one.lease_id not in self._consumed]

    def commit(self) -> Position:
        """Declare the batch trained and begin the next; returns the position behind it."""
        self.position = Position(self._cursor, self._consumed, self._ended)
        self._begin()
        return self.position


def closing(trajectory: Trajectory, outcome: str) -> PosteriorUpdate:
    """The update that closes a trajectory's lease as ``trained`` or ``stale``."""
    return PosteriorUpdate.model_validate(
        {
            "lease_id": trajectory.lease_id,
            "prompt_id": trajectory.prompt_id,
            "outcome": outcome,
            "reward": trajectory.reward,
            "version": trajectory.last_version,
        }
    )
