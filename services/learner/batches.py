"""Which stream entries make the next train batch: a pure state machine, with no client and no clock in it.

What it decides depends on its position, the entries in stream order and the learner's step alone, so a resumed learner
makes the same batches again.

A batch is made of whole groups. With SPO a group is one lease. With GRPO it is the leases of one prompt that were
issued at once; it is whole when each of them has ended in the stream, as a trajectory or otherwise, and is decided on
in that moment: what can be trained of it goes into the batch, the rest leaves it smaller. Entries of groups that are
not whole wait, and the cursor stays before the first of them, so a resumed learner reads them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from singlestream.contracts import (
    EndOfRun,
    Message,
    PosteriorUpdate,
    Tombstone,
    Trajectory,
    group_of,
    parse_lease_id,
)
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

    def __len__(self) -> int:
        return sum(low + len(above) for low, above in self._epochs.values())

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
        cursor: last entry before which, itself included, all is consumed; ``0-0`` before the first.
        consumed: leases trained, stale or failed, also those of entries beyond the cursor.
        ended: the end marker is behind the cursor.
    """

    cursor: str = "0-0"
    consumed: ConsumedLeases = field(default_factory=ConsumedLeases)
    ended: bool = False


class Verdict(Enum):
    """What becomes of one stream entry."""

    TRAINABLE = "trainable"
    WAITING = "waiting"
    DUPLICATE = "duplicate"
    FAILED = "failed"
    MALFORMED = "malformed"
    STALE = "stale"
    END = "end"


@dataclass(frozen=True)
class Decision:
    """A verdict, and what the caller must do at once.

    Args:
        verdict: what the entry is; ``WAITING`` for a trajectory whose group is not whole.
        updates: posterior updates to send now: of stale trajectories, and of a malformed entry with a known lease.
        dead_letter: reason with which the entry goes to the dead letters; None where it does not.
    """

    verdict: Verdict
    updates: tuple[PosteriorUpdate, ...] = ()
    dead_letter: str | None = None


@dataclass(frozen=True)
class _Member:
    """One ended lease of a group that is not whole.

    Args:
        before: cursor before its entry.
        trajectory: None where it ended without one.
        raw: the trajectory's message.
    """

    before: str
    trajectory: Trajectory | None
    raw: bytes


class BatchAssembler:
    """Collects ``batch_size`` leases' worth of whole groups, in the order in which they become whole.

    Args:
        batch_size: trajectories of a batch; groups that lost members make it smaller.
        staleness_bound: a trajectory whose generated segments are all older than this many updates is stale (I11).
        position: where to go on from.
        group_size: leases of a group; divides ``batch_size``.
        total_leases: of the run, where none is made up for (groups); None where lost ones are issued again.

    Attributes:
        batch: trainable trajectories and their messages.
        stale: trajectories too old to train that were decided on since the last batch.

    Example: ``offer`` entries until ``complete``, train `batch`, then `commit`.
    """

    def __init__(
        self,
        batch_size: int,
        staleness_bound: int,
        position: Position,
        group_size: int = 1,
        total_leases: int | None = None,
    ) -> None:
        self.batch_size, self.staleness_bound, self.group_size = batch_size, staleness_bound, group_size
        self.total_leases = total_leases
        self.position = position
        self._cursor = position.cursor
        self._consumed = position.consumed.copy()
        self._ended = position.ended
        self._waiting: dict[str, dict[str, _Member]] = {}
        self._begin()

    def _begin(self) -> None:
        self.batch: list[tuple[Trajectory, bytes]] = []
        self.stale: list[Trajectory] = []
        self._groups = 0

    @property
    def ended(self) -> bool:
        """Whether no further trajectory will come: the end marker was met, or every lease of the run has ended."""
        return self._ended or (self.total_leases is not None and len(self._consumed) >= self.total_leases)

    @property
    def complete(self) -> bool:
        """Whether the batch is full, or the run has ended and this is the remainder (which may be empty)."""
        full = self._groups >= self.batch_size // self.group_size and bool(self.batch)
        return self.ended or full

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
        before, self._cursor = self._cursor, entry
        if isinstance(message, EndOfRun):
            self._ended = True
            leftovers = [one for group in list(self._waiting) for one in self._decide(group, step)]
            return Decision(Verdict.END, tuple(leftovers))
        if isinstance(message, Trajectory | Tombstone):
            number = message.lease_id
        known = number.startswith(_TRAINING) and _LEASE_ID.match(number) is not None
        group = group_of(number, self.group_size) if known else ""
        if known and (number in self._consumed or number in self._waiting.get(group, {})):
            return Decision(Verdict.DUPLICATE)
        updates: list[PosteriorUpdate] = []
        trajectory = message if isinstance(message, Trajectory) else None
        if known:
            members = self._waiting.setdefault(group, {})
            members[number] = _Member(before, trajectory, raw)
            if len(members) == self.group_size:
                updates = self._decide(group, step)
        if trajectory is not None and known:
            return Decision(self._verdict(trajectory, group), tuple(updates))
        if isinstance(message, Tombstone):
            return Decision(Verdict.FAILED, tuple(updates))
        if known:
            updates.append(PosteriorUpdate(lease_id=number, prompt_id="", outcome="failed"))
        reason = error or f"a {type(message).__name__} does not belong in the trajectory stream"
        return Decision(Verdict.MALFORMED, tuple(updates), reason)

    def _verdict(self, trajectory: Trajectory, group: str) -> Verdict:
        if group in self._waiting:
            return Verdict.WAITING
        return Verdict.STALE if any(one is trajectory for one in self.stale) else Verdict.TRAINABLE

    def _decide(self, group: str, step: int) -> list[PosteriorUpdate]:
        """Take a whole group out of the waiting; returns the updates of its stale members."""
        members = self._waiting.pop(group)
        stale, trained = [], len(self.batch)
        for number, member in members.items():
            self._consumed.add(number)
            if member.trajectory is not None and self._trainable(member.trajectory, step):
                self.batch.append((member.trajectory, member.raw))
            elif member.trajectory is not None:
                stale.append(member.trajectory)
        self.stale += stale
        # the value store replaces a lease that was lost, but not members of a group: so a group counts whatever is left
        self._groups += int(self.group_size > 1 or len(self.batch) > trained)
        return [closing_update(one, "stale") for one in stale]

    def _trainable(self, trajectory: Trajectory, step: int) -> bool:
        return any(
            len(segment.token_ids) > 0 and max(0, step - segment.version) <= self.staleness_bound
            for segment in trajectory.segments
            if segment.version is not None
        )

    def waiting(self) -> list[tuple[Trajectory, bytes]]:
        """Trajectories of groups that are not whole, and their messages."""
        members = [one for group in self._waiting.values() for one in group.values()]
        return [(one.trajectory, one.raw) for one in members if one.trajectory is not None]

    def upcoming(self, messages: Iterable[Message | None]) -> list[Trajectory]:
        """Trajectories among messages beyond the cursor that no finished lease stands behind; changes nothing."""
        return [one for one in messages if isinstance(one, Trajectory) and one.lease_id not in self._consumed]

    def commit(self) -> Position:
        """Declare the batch trained and begin the next; returns the position behind it."""
        first = next((one for group in self._waiting.values() for one in group.values()), None)
        self.position = Position(first.before if first else self._cursor, self._consumed.copy(), self._ended)
        self._begin()
        return self.position


def closing_update(trajectory: Trajectory, outcome: str, drift: float | None = None) -> PosteriorUpdate:
    """The update that closes a trajectory's lease as ``trained`` or ``stale``, with exact drift where it is known."""
    return PosteriorUpdate.model_validate(
        {
            "lease_id": trajectory.lease_id,
            "prompt_id": trajectory.prompt_id,
            "outcome": outcome,
            "reward": trajectory.reward,
            "version": trajectory.last_version,
            "kl": drift,
        }
    )
