"""Where batches come from: rank 0 reads the stream and decides; every rank gets the same batch, or the same end."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import msgpack

from services.learner.anchors import Anchor
from services.learner.batches import BatchAssembler, Position
from services.learner.ranks import Ranks
from services.learner.redis_link import RedisLink
from services.learner.samples import Sample, check_scorable, to_sample
from singlestream.contracts import Message, PosteriorUpdate, Trajectory, decode
from singlestream.errors import ContractError, DeadlineExceeded
from singlestream.streams.anchors import is_anchored

log = logging.getLogger(__name__)

POLL_MS = 500
"""A rank learns of a stop within about this."""
READ_ENTRIES = 64
"""Entries of one read: a megabyte or two of short trajectories."""
PEEK_ENTRIES = 512
"""At most so many entries beyond the batch are held in memory for the drift clock's probe."""


@dataclass(frozen=True)
class Entry:
    """One entry of the trajectory stream, decoded where that was possible."""

    entry: str
    number: str
    raw: bytes
    message: Message | None
    error: str


@dataclass(frozen=True)
class Batch:
    """What one step trains.

    Args:
        samples: trainable trajectories, in stream order.
        upcoming: what has arrived of the next batch.
        trajectories: the samples' messages.
        anchors: what is kept of each one's prompt; None where nothing is.
        stale: trajectories counted but not trained since the last batch; known to rank 0.
        wait_s: seconds without enough trajectories.
    """

    samples: list[Sample]
    upcoming: list[Sample]
    trajectories: list[Trajectory]
    anchors: list[Anchor | None]
    stale: list[Trajectory]
    wait_s: float


class StopRequest:
    """Set by SIGTERM and SIGINT; a second one does nothing more."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True


class StreamReader:
    """Rank 0's reader: reads on behind its last entry, and keeps what is not decided yet.

    Args:
        link: to Redis.
        assembler: decides what each entry is.
        vocabulary: rows of the model's embedding.
        longest_tokens: positions of the model.
        wait_warn_s: after so long the log says what is waited for.
        wait_timeout_s: after so long without any entry a wait fails; the seconds of the step before do not count, nor
            those in which training is paused.

    Raises:
        CheckpointError: the stream no longer has what comes after the position.
    """

    def __init__(
        self,
        link: RedisLink,
        assembler: BatchAssembler,
        vocabulary: int,
        longest_tokens: int,
        wait_warn_s: float,
        wait_timeout_s: float,
    ) -> None:
        self.link, self.assembler = link, assembler
        self._limits = (vocabulary, longest_tokens)
        self._warn_s, self._timeout_s = wait_warn_s, wait_timeout_s
        self._held: deque[Entry] = deque()
        self._read_to = assembler.position.cursor
        self._last_arrival = time.monotonic()
        self._warnings = 0
        link.call(lambda: link.streams.check_kept(self._read_to), "the stream behind the checkpoint")

    def _read(self, block_ms: int | None, count: int) -> None:
        after = self._read_to
        entries = self.link.call(lambda: self.link.streams.read(after, count, block_ms), "trajectories")
        for entry, number, raw in entries:
            self._held.append(self._decode(entry, number.decode("utf-8", "replace"), raw))
            self._read_to = entry
        if entries:
            self._last_arrival, self._warnings = time.monotonic(), 0

    def _decode(self, entry: str, number: str, raw: bytes) -> Entry:
        try:
            message = decode(raw)
            if isinstance(message, Trajectory):
                check_scorable(message, *self._limits)
        except ContractError as error:
            return Entry(entry, number, raw, None, str(error))
        return Entry(entry, number, raw, message, "")

    def poll(self, step: int) -> bool:
        """Go on with the batch for at most `POLL_MS`; returns whether it is complete.

        Raises:
            DeadlineExceeded: nothing arrived for ``wait_timeout_s``; names what was waited for.
            Fenced: another learner has taken over.
        """
        self._offer(step)
        if self.assembler.complete:
            return True
        self._read(POLL_MS, READ_ENTRIES)
        self._offer(step)
        if not self.assembler.complete:
            self._complain()
        return self.assembler.complete

    def _offer(self, step: int) -> None:
        updates: list[PosteriorUpdate] = []
        while self._held and not self.assembler.complete:
            one = self._held.popleft()
            decision = self.assembler.offer(one.entry, one.number, one.message, one.raw, one.error, step)
            if decision.dead_letter is not None:
                reason = decision.dead_letter
                log.error("entry %s (lease %r) is of no use: %s", one.entry, one.number, reason)
                self._bury(one, reason)
            updates += decision.updates
        if updates:
            self.link.call(lambda: self.link.streams.send_updates(updates), "updates of leases that do not train")

    def commit(self) -> Position:
        """Declare the batch trained; returns the position behind it. The wait for the next one begins."""
        self._last_arrival, self._warnings = time.monotonic(), 0
        return self.assembler.commit()

    def _bury(self, one: Entry, reason: str) -> None:
        self.link.call(lambda: self.link.streams.dead_letter(one.number, one.raw, reason), "a dead letter")

    def waiting_for(self) -> str:
        """How much of the batch is there."""
        waiting = len(self.assembler.waiting())
        rest = f", and {waiting} of groups that are not whole" if waiting else ""
        return f"trajectories: {len(self.assembler.batch)} of {self.assembler.batch_size} have arrived{rest}"

    def _complain(self) -> None:
        if self.link.call(self.link.streams.is_paused, "the state of training"):
            self._last_arrival, self._warnings = time.monotonic(), 0
            return
        silent_s = time.monotonic() - self._last_arrival
        if silent_s > self._timeout_s:
            raise DeadlineExceeded(f"{self.waiting_for()}; is a rollout replica alive?", silent_s)
        if silent_s > self._warn_s * (self._warnings + 1):
            self._warnings += 1
            log.warning("for %.0f s nothing has arrived; waiting for %s", silent_s, self.waiting_for())

    def upcoming(self, most_tokens: int) -> list[bytes]:
        """Messages beyond the batch that have already arrived, up to ``most_tokens`` action tokens; moves no cursor."""
        while not self.assembler.ended:
            messages, tokens = self._ahead(most_tokens)
            held = len(self._held)
            if tokens >= most_tokens or held >= PEEK_ENTRIES:
                return messages
            self._read(None, READ_ENTRIES)
            if len(self._held) == held:
                return messages
        return []

    def _ahead(self, most_tokens: int) -> tuple[list[bytes], int]:
        """What is held of the next batch, and its action tokens."""
        messages = [raw for _, raw in self.assembler.waiting()]
        tokens = sum(trajectory.action_tokens for trajectory, _ in self.assembler.waiting())
        fresh = {one.lease_id for one in self.assembler.upcoming([held.message for held in self._held])}
        for held in self._held:
            if isinstance(held.message, Trajectory) and held.message.lease_id in fresh and tokens < most_tokens:
                messages.append(held.raw)
                tokens += held.message.action_tokens
        return messages, tokens

    def anchors(self, share: float) -> list[bytes]:
        """What is kept of the prompt of each trajectory of the batch; empty where nothing is."""
        prompts = [trajectory.prompt_id for trajectory, _ in self.assembler.batch]
        wanted = [prompt for prompt in dict.fromkeys(prompts) if is_anchored(prompt, share)]
        found = self.link.call(lambda: self.link.streams.anchors(wanted), "anchors") if wanted else []
        packed = dict(zip(wanted, found, strict=True))
        return [packed.get(prompt) or b"" for prompt in prompts]


class Intake:
    """The collective side: `take` gives the same answer on every rank.

    Args:
        ranks: the group.
        reader: on rank 0; None elsewhere.
        staleness_bound: segments older than this many updates are masked.
        probe_tokens: action tokens wanted of the next batch.
        anchor_share: share of the prompts of which a response is kept.
        stop: this process's stop request.
    """

    def __init__(
        self,
        ranks: Ranks,
        reader: StreamReader | None,
        staleness_bound: int,
        probe_tokens: int,
        anchor_share: float,
        stop: StopRequest,
    ) -> None:
        self.ranks, self.reader, self.stop = ranks, reader, stop
        self._bound, self._probe_tokens, self._anchor_share = staleness_bound, probe_tokens, anchor_share

    def take(self, step: int) -> Batch | None:
        """The next train batch; None when the run has ended or a stop was asked for.

        Args:
            step: optimizer steps taken so far.

        Raises:
            SinglestreamError: rank 0 cannot go on, with its cause, on every rank.
        """
        started = time.monotonic()
        while True:
            stopping = self.ranks.any(self.stop.requested)
            answer = msgpack.unpackb(self.ranks.from_first(partial(self._answer, step, stopping)))
            if answer["kind"] == "stop":
                log.info("stopping after step %d: %s", step, answer["cause"])
                return None
            if answer["kind"] == "batch":
                return self._batch(answer, step, time.monotonic() - started)

    def _answer(self, step: int, stopping: bool) -> bytes:
        """Rank 0's word to all: go on waiting, stop, or train this batch."""
        assert self.reader is not None  # noqa: S101  rank 0 has a reader
        answer: dict[str, Any] = {"kind": "wait"}
        if stopping:
            answer = {"kind": "stop", "cause": "a signal asked for it"}
        elif self.reader.poll(step):
            answer = self._complete()
        else:
            status = self.reader.link.status
            status.waiting_for = self.reader.waiting_for()  # first: a heartbeat may be sent between the two
            status.state = "waiting"
        return bytes(msgpack.packb(answer))

    def _complete(self) -> dict[str, Any]:
        assert self.reader is not None  # noqa: S101  rank 0 has a reader
        batch = self.reader.assembler.batch
        if not batch:
            return {"kind": "stop", "cause": "no further trajectory will come"}
        return {
            "kind": "batch",
            "messages": [raw for _, raw in batch],
            "upcoming": self.reader.upcoming(self._probe_tokens),
            "anchors": self.reader.anchors(self._anchor_share),
        }

    def _batch(self, answer: dict[str, Any], step: int, wait_s: float) -> Batch:
        trajectories = [self._trajectory(raw) for raw in answer["messages"]]
        upcoming = [self._trajectory(raw) for raw in answer["upcoming"]]
        if self.reader:
            self.reader.link.status.state, self.reader.link.status.waiting_for = "training", ""
        return Batch(
            samples=self._samples(trajectories, step),
            upcoming=self._samples(upcoming, step),
            trajectories=trajectories,
            anchors=[Anchor.unpack(packed) if packed else None for packed in answer["anchors"]],
            stale=list(self.reader.assembler.stale) if self.reader else [],
            wait_s=wait_s,
        )

    def _trajectory(self, raw: bytes) -> Trajectory:
        message = decode(raw)
        assert isinstance(message, Trajectory)  # noqa: S101  rank 0 decoded it before
        return message

    def _samples(self, trajectories: Sequence[Trajectory], step: int) -> list[Sample]:
        return [to_sample(trajectory, step, self._bound) for trajectory in trajectories]

    def commit(self) -> Position | None:
        """Declare the batch trained; returns rank 0's new position, None elsewhere."""
        return self.reader.commit() if self.reader else None

    @property
    def ended(self) -> bool:
        """Whether rank 0 knows that no further trajectory will come; False elsewhere."""
        return self.reader is not None and self.reader.assembler.ended

    @property
    def position(self) -> Position | None:
        """Rank 0's position behind the last trained batch; None elsewhere."""
        return self.reader.assembler.position if self.reader else None
