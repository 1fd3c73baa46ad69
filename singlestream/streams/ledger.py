"""The value store's side.

Leases, values and the ledger, each change one script behind the store's fence (docs/design.md, I1, I2, I12).

Every write compares the fence with this store's epoch, and those that apply a stream compare its cursor too, so a
change happens once or not at all. A reply that is lost, a server that has restarted (its script cache is empty) or a
Redis that differs from the store's memory raises `UnknownOutcome`: the caller forgets its memory, takes a new epoch
and reads everything again.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from singlestream.contracts import EndOfRun, Lease, Outcome, Purpose, Tombstone, encode
from singlestream.errors import Fenced, UnknownOutcome
from singlestream.streams.connection import LOST
from singlestream.streams.keys import GROUP, Keys
from singlestream.streams.ledger_scripts import CANCEL, COMMIT, END_TRAINING, ISSUE, TAKE_OVER, TIDY

PURPOSES: tuple[Purpose, ...] = ("train", "estimate", "evaluate")
OUTCOMES: tuple[Outcome, ...] = ("trained", "stale", "failed", "scored", "cancelled")

LEASES_PER_SCRIPT = 256
"""Leases that one script issues or cancels: a long script holds up everyone."""


def prompt_id(source: str, question: str) -> str:
    """Stable number of a prompt: 16 hex digits of the SHA-256 of its source and its question."""
    return hashlib.sha256(f"{source}\x00{question}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LedgerCounts:
    """The ledger of one purpose (I1).

    Args:
        leased: leases ever issued.
        outstanding: leases that have not ended.
        ended: leases by outcome; every outcome is a key.
    """

    leased: int
    outstanding: int
    ended: dict[Outcome, int]

    @property
    def adds_up(self) -> bool:
        """Leased = outstanding + trained + stale + failed + scored + cancelled."""
        return self.leased == self.outstanding + sum(self.ended.values())


async def read_ledger(redis: Redis, keys: Keys) -> dict[Purpose, LedgerCounts]:
    """Read the whole ledger at one moment, from Redis alone."""
    async with redis.pipeline(transaction=True) as pipe:
        pipe.hgetall(keys.ledger)
        for purpose in PURPOSES:
            pipe.hlen(keys.outstanding(purpose))
        raw, *outstanding = await pipe.execute()
    counts = {name.decode(): int(count) for name, count in raw.items()}
    return {
        purpose: LedgerCounts(
            leased=counts.get(f"{purpose}:leased", 0),
            outstanding=number,
            ended={outcome: counts.get(f"{purpose}:{outcome}", 0) for outcome in OUTCOMES},
        )
        for purpose, number in zip(PURPOSES, outstanding, strict=True)
    }


@dataclass
class Change:
    """One atomic change of values and ledger.

    Args:
        stream: key of the stream that is applied; None for a change that no stream asked for.
        before: its cursor as the store remembers it; the change happens only if Redis agrees.
        after: its new cursor; older entries are trimmed.
        closes: (purpose, outcome) → leases that must be outstanding.
        values: prompt id → packed posterior.
        prompts: prompt id → packed prompt.
        history: (prompt id, record), oldest first.
        jobs: job id → packed job.
        job_results: job id → {item: packed result}.
        dropped_jobs: job ids that are forgotten, with their results.
        dead_letters: (source, lease, reason, message).
        duplicates: entries that named no outstanding lease.
        state: what training does from now on; None leaves it.
        calibration: packed sums; None leaves them.
        anchors: (prompt id, lease) of leases that close with evidence, where responses of the prompt are kept.
        pin: the pinned evaluation under way as text, empty for none; None leaves it.
    """

    stream: str | None = None
    before: str = "0-0"
    after: str = "0-0"
    closes: dict[tuple[Purpose, Outcome], list[str]] = field(default_factory=lambda: defaultdict(list))
    values: dict[str, bytes] = field(default_factory=dict)
    prompts: dict[str, bytes] = field(default_factory=dict)
    history: list[tuple[str, bytes]] = field(default_factory=list)
    jobs: dict[str, bytes] = field(default_factory=dict)
    job_results: dict[str, dict[str, bytes]] = field(default_factory=dict)
    dropped_jobs: list[str] = field(default_factory=list)
    dead_letters: list[tuple[str, str, str, bytes]] = field(default_factory=list)
    duplicates: int = 0
    state: str | None = None
    calibration: bytes | None = None
    anchors: list[tuple[str, str]] = field(default_factory=list)
    pin: str | None = None

    def close(self, lease: str, outcome: Outcome) -> None:
        """Add one lease to ``closes``."""
        self.closes[lease.split(":", 1)[0], outcome].append(lease)  # type: ignore[index]


def _lease_and_message(fields: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Lease number and message of an entry that may have been written by hand."""
    known = dict(zip(fields[::2], fields[1::2], strict=True))
    return known.get(b"id", b""), known.get(b"m", b"")


class ValueStoreStreams:
    """What the value store reads and writes.

    A write raises `Fenced` once another store has taken over, and `UnknownOutcome` where it may or may not have
    happened; then `take_over` comes before the next one. Nothing is repeated here.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self.epoch = ""
        self._epochs: list[str] = []
        self._shas: dict[str, str] = {}

    async def take_over(self) -> str:
        """Become the one writer, with a new epoch (8 hex digits), which it returns.

        Until a call has succeeded, the fence is taken from anyone; later only from this process's own epochs, so a
        store that was replaced while its connection was down learns it here.

        Raises:
            Fenced: another store has taken over since.
        """
        epoch = secrets.token_hex(4)
        mine = self._epochs if self.epoch else []
        self._epochs = [*self._epochs, epoch]
        for text in (ISSUE, COMMIT, CANCEL, END_TRAINING, TIDY):
            self._shas[text] = await self.redis.script_load(text)
        taken = await self.redis.eval(TAKE_OVER, 1, self.keys.fence("value_store"), epoch, *mine)
        if taken is None:
            raise self._fenced()
        self.epoch = epoch
        for purpose in PURPOSES:
            try:
                await self.redis.xgroup_create(self.keys.leases(purpose), GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
        return epoch

    def check_fence(self, holder: bytes | None) -> None:
        """Raise `Fenced` where the fence, as read from Redis, is another store's; None is nobody's."""
        if holder is not None and holder.decode(errors="replace") not in self._epochs:
            raise self._fenced()

    def _fenced(self) -> Fenced:
        return Fenced(f"another value store has taken over run {self.keys.run!r}; this one stops")

    async def _write(self, script: str, keys: Sequence[str], args: Sequence[str | bytes]) -> Any:
        fence = self.keys.fence("value_store")
        try:
            reply = await self.redis.evalsha(self._shas[script], len(keys) + 1, fence, *keys, self.epoch, *args)
        except NoScriptError as error:
            raise UnknownOutcome("Redis has restarted since this store read it") from error
        except LOST as error:
            raise UnknownOutcome(f"a write was refused, or its reply was lost ({error})") from error
        if reply is None:
            raise self._fenced()
        return reply

    async def issue(self, purpose: Purpose, leases: Sequence[tuple[Lease, bytes]], together: int = 1) -> None:
        """Append leases to their stream and to the ledger; each comes with its record of what is outstanding.

        So many as ``together`` says, one after another, are issued all or none.
        """
        keys = [
            self.keys.leases(purpose),
            self.keys.live,
            self.keys.outstanding(purpose),
            self.keys.ledger,
        ]
        most = max(LEASES_PER_SCRIPT // together, 1) * together
        for start in range(0, len(leases), most):
            part = leases[start : start + most]
            fields = [text for lease, record in part for text in (lease.lease_id, encode(lease), record)]
            await self._write(ISSUE, keys, [f"{purpose}:leased", *fields])

    async def commit(self, change: Change, history_entries: int) -> None:
        """Apply a change as a whole.

        Raises `UnknownOutcome` also where Redis differs from what the change was computed from.
        """
        closes: dict[str, list[str]] = defaultdict(list)
        counts = {f"{purpose}:{outcome}": len(leases) for (purpose, outcome), leases in change.closes.items()}
        for (purpose, _), leases in change.closes.items():
            closes[self.keys.outstanding(purpose)] += leases
        if change.duplicates:
            counts["duplicates"] = change.duplicates
        if change.dropped_jobs:
            counts["jobs_dropped"] = len(change.dropped_jobs)
        histories = self.keys.history("")
        strings = {
            self.keys.state: change.state,
            self.keys.calibration: change.calibration,
            self.keys.pin: change.pin,
        }
        hashes = {
            self.keys.values: change.values,
            self.keys.prompts: change.prompts,
            self.keys.jobs: change.jobs,
            **{self.keys.job_results(job): results for job, results in change.job_results.items()},
        }
        wire = {
            "stream": change.stream or False,
            "before": change.before,
            "after": change.after,
            "closes": closes,
            "hashes": {key: [*chain.from_iterable(items.items())] for key, items in hashes.items() if items},
            "dropped_jobs": change.dropped_jobs,
            "jobs": self.keys.jobs,
            "job_results": self.keys.job_results(""),
            "history": [x for prompt, record in change.history for x in (histories + prompt, record)],
            "history_entries": history_entries,
            "counts": counts,
            "strings": {key: text for key, text in strings.items() if text is not None},
            "dead_letters": change.dead_letters,
            "anchors": [*chain.from_iterable(change.anchors)],
        }
        packed = msgpack.packb(wire, use_bin_type=False)  # Lua's strings are bytes
        anchors = [self.keys.anchor_of, self.keys.anchors, self.keys.anchor_ages, self.keys.anchor_counts]
        reply = await self._write(
            COMMIT, [self.keys.cursors, self.keys.ledger, self.keys.dead_letters, *anchors], [packed]
        )
        if reply != 1:
            raise UnknownOutcome(f"{reply.decode()} in Redis differs from this store's memory")

    async def tidy(self, dead_letters_kept: int, idle_s: float) -> tuple[int, int]:
        """Drop the oldest dead letters beyond a bound, which is counted, and consumers that hold nothing any more.

        Args:
            dead_letters_kept: the bound.
            idle_s: consumers that have been silent for longer go.

        Returns:
            (dead letters, consumers) dropped.
        """
        keys = [self.keys.ledger, self.keys.dead_letters, *map(self.keys.leases, PURPOSES)]
        letters, consumers = await self._write(TIDY, keys, [str(dead_letters_kept), GROUP, str(int(idle_s * 1000))])
        return int(letters), int(consumers)

    async def unread(self, purpose: Purpose) -> list[tuple[str, str]]:
        """(lease, entry) of leases that no replica has been given yet."""
        stream = self.keys.leases(purpose)
        read = "0-0"
        for group in await self.redis.xinfo_groups(stream):
            if group["name"] == GROUP.encode():
                read = group["last-delivered-id"].decode()
        entries = await self.redis.xrange(stream, f"({read}", "+")
        return [(fields.get(b"id", b"").decode(), entry.decode()) for entry, fields in entries]

    async def cancel(self, purpose: Purpose, unread: Sequence[tuple[str, str, Tombstone]]) -> list[str]:
        """End those of the leases, given as (lease, entry, tombstone), that are still unread; returns their numbers.

        A tombstone stands in each one's place in the stream of results, so that the numbers read there stay without
        gaps.
        """
        keys = [
            self.keys.leases(purpose),
            self.keys.live,
            self.keys.outstanding(purpose),
            self.keys.results(purpose),
            self.keys.ledger,
        ]
        cancelled: list[str] = []
        for start in range(0, len(unread), LEASES_PER_SCRIPT):
            part = unread[start : start + LEASES_PER_SCRIPT]
            fields = [text for lease, entry, tombstone in part for text in (lease, entry, encode(tombstone))]
            reply = await self._write(CANCEL, keys, [GROUP, f"{purpose}:cancelled", *fields])
            cancelled.extend(lease.decode() for lease in reply)
        return cancelled

    async def end_training(self, reason: str, before: str, after: str) -> bool:
        """Append the end marker and move the state, once every training lease has ended in the stream.

        False: not yet.
        """
        keys = [self.keys.outstanding("train"), self.keys.live, self.keys.trajectories, self.keys.state]
        return bool(await self._write(END_TRAINING, keys, [encode(EndOfRun(reason=reason)), before, after]))

    async def read_stream(
        self, stream: str, after: str, count: int, block_ms: int | None
    ) -> list[tuple[str, bytes, bytes]]:
        """Entries after the cursor as (entry, lease, encoded message).

        Waits ``block_ms`` for the first one; None returns at once.
        """
        block = [] if block_ms is None else ["BLOCK", block_ms]
        # As bytes, the command's name has no parser in redis-py, whose dictionaries cost more than the reply itself.
        reply = await self.redis.execute_command(b"XREAD", "COUNT", count, *block, "STREAMS", stream, after)
        if not reply:
            return []
        [(_, entries)] = reply.items() if isinstance(reply, dict) else reply  # RESP 3 and 2
        return [
            (entry.decode(), fields[1], fields[3])
            if len(fields) == 4 and fields[0] == b"id" and fields[2] == b"m"
            else (entry.decode(), *_lease_and_message(fields))
            for entry, fields in entries
        ]

    async def scan(self, key: str) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """All fields of a hash in batches, without holding Redis up for long.

        A field may come twice while the hash grows.
        """
        cursor = 0
        while True:
            cursor, part = await self.redis.hscan(key, cursor, count=10_000)
            if part:
                yield list(part.items())
            if cursor == 0:
                return
