"""The run's newest trajectories, for a prompt's story: in memory only, within a bound, read from their stream."""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from singlestream.clients.value_store_replies import ShownTrajectory, TrajectorySegment, TrajectoryToolCall
from singlestream.contracts import Trajectory, decode
from singlestream.errors import ContractError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024 * 1024
"""Of all trajectories that are kept, encoded: about 200 of 32k tokens, or 100,000 short ones."""


class LastTrajectories:
    """Trajectories by lease, the oldest given up first.

    Args:
        max_bytes: bound of their encoded size; the newest one stays whatever its size.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.held_bytes = max_bytes, 0
        self._kept: OrderedDict[str, tuple[str, bytes]] = OrderedDict()

    def add(self, data: bytes) -> None:
        """Keep an entry of the stream, if it is a trajectory that can be read. The same one again changes nothing."""
        try:
            message = decode(data)
        except ContractError:
            return  # the learner makes a dead letter of it
        if not isinstance(message, Trajectory) or message.lease_id in self._kept:
            return
        self._kept[message.lease_id] = (message.prompt_id, data)
        self.held_bytes += len(data)
        while self.held_bytes > self.max_bytes and len(self._kept) > 1:
            _, (_, oldest) = self._kept.popitem(last=False)
            self.held_bytes -= len(oldest)

    def of(self, prompt_id: str, count: int) -> list[Trajectory]:
        """The newest trajectories of a prompt, newest first."""
        found = [data for one, data in reversed(self._kept.values()) if one == prompt_id]
        return [message for data in found[:count] if isinstance(message := decode(data), Trajectory)]


@cache
def find_tokenizer(model: Path) -> Tokenizer | None:
    """The model's tokenizer; None where its folder is not on this machine."""
    file = model / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer  # after the check: most stores have no model beside them

    return Tokenizer.from_file(str(file))


def show(trajectory: Trajectory, tokenizer: Tokenizer | None) -> ShownTrajectory:
    """A trajectory as REST shows it."""
    segments = [
        TrajectorySegment(
            kind=one.kind,
            version=one.version,
            tokens=len(one.token_ids),
            text=tokenizer.decode(one.token_ids.tolist(), skip_special_tokens=False) if tokenizer else None,
        )
        for one in trajectory.segments
    ]
    return ShownTrajectory(
        **trajectory.model_dump(
            include={"lease_id", "reward", "v_hat", "end_reason", "turns", "attempts", "finished_at_s"}
        ),
        version=trajectory.last_version,
        tool_calls=[TrajectoryToolCall(**call.model_dump()) for call in trajectory.tool_calls],
        segments=segments,
    )
