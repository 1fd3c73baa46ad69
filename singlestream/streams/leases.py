"""A replica's side of the lease stream.

Take, keep alive, and end or hand over, each end in one script (docs/design.md, life of a trajectory).

``live[lease]`` names the entry that holds the lease. A script that ends or moves the lease first compares it with the
caller's entry, so the first finisher wins whoever it is, and a second changes nothing: a zombie, a claimed entry or a
repeated call after a lost reply alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from singlestream.contracts import (
    FailReason,
    Lease,
    PosteriorUpdate,
    Progress,
    Purpose,
    Tombstone,
    Trajectory,
    decode_as,
    encode,
)
from singlestream.errors import ContractError
from singlestream.streams.keys import GROUP, Keys

END = """
-- KEYS: live, leases, target...   ARGV: lease, entry, group, payload...   (one payload for each target)
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return false end
for i = 3, #KEYS do
  local entry = redis.call('XADD', KEYS[i], '*', 'id', ARGV[1], 'm', ARGV[i + 1])
  if KEYS[i] == KEYS[2] then
    redis.call('HSET', KEYS[1], ARGV[1], entry)
  elseif i == 3 then
    redis.call('HDEL', KEYS[1], ARGV[1])
  end
end
redis.call('XACK', KEYS[2], ARGV[3], ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[2])
return true
"""

HEARTBEAT = """
-- KEYS: live, leases   ARGV: group, consumer, (lease, entry)...   returns the leases that are no longer ours
local lost = {}
for i = 3, #ARGV, 2 do
  local pending = redis.call('XPENDING', KEYS[2], ARGV[1], ARGV[i + 1], ARGV[i + 1], 1)
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] and pending[1] and pending[1][2] == ARGV[2] then
    redis.call('XCLAIM', KEYS[2], ARGV[1], ARGV[2], 0, ARGV[i + 1], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""


CLAIM_COUNT = 64
"""Leases that one command claims from silent holders."""


@dataclass(frozen=True)
class Held:
    """A lease in a replica's hands, and the stream entry that makes it so."""

    lease: Lease
    entry: str

    @property
    def progress(self) -> Progress | None:
        """What the lease came with, as if no time had passed since: nothing that was done in it has been kept.

        By Redis' clock, which wrote the entry, and this machine's.
        """
        return begun_later(self.lease.progress, time.time() - int(self.entry.partition("-")[0]) / 1000)


def begun_later(progress: Progress | None, seconds: float) -> Progress | None:
    """The same progress, begun so much later: what an episode waits for a replica is no part of its wall time."""
    if progress is None:
        return None
    return progress.model_copy(update={"started_at_s": progress.started_at_s + max(0.0, seconds)})


class LeaseConsumer:
    """One replica in the consumer group of the lease streams.

    All methods but `take` may be repeated safely after a lost connection; an entry taken in a lost reply is claimed
    after the lease time-out.

    Args:
        redis: a client from `connect`.
        keys: keys of the run.
        consumer: name of this replica, unique among all that ever ran.
    """

    def __init__(self, redis: Redis, keys: Keys, consumer: str) -> None:
        self.redis, self.keys, self.consumer = redis, keys, consumer
        self._end = redis.register_script(END)
        self._heartbeat = redis.register_script(HEARTBEAT)

    async def join(self, purposes: Sequence[Purpose] = ("train", "estimate", "evaluate")) -> None:
        """Make the groups where they do not exist yet."""
        for purpose in purposes:
            try:
                await self.redis.xgroup_create(self.keys.leases(purpose), GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def take(self, purposes: Sequence[Purpose], count: int, block_ms: int | None) -> list[Held]:
        """Take up to ``count`` new leases, those of the first purpose first; waits at most ``block_ms`` for one.

        None does not wait at all; Redis ends the shortest wait after up to 100 ms.

        A waiting read may bring one of every purpose at once, so with a lower ``count`` it is not waited.
        Damaged leases go to the dead letters.
        """
        held: list[Held] = []
        for purpose in purposes:
            if len(held) < count:
                held += await self._read([purpose], count - len(held), block_ms=None)
        if not held and block_ms is not None and count >= len(purposes):
            held = await self._read(purposes, 1, block_ms)
        return held

    async def _read(self, purposes: Sequence[Purpose], count: int, block_ms: int | None) -> list[Held]:
        streams = {self.keys.leases(purpose): ">" for purpose in purposes}
        reply = await self.redis.xreadgroup(GROUP, self.consumer, streams, count=count, block=block_ms)
        decoded = [
            await self._decode(stream.decode(), entry.decode(), fields)
            for stream, entries in reply or []
            for entry, fields in entries
        ]
        return [held for held in decoded if held is not None]

    async def _decode(self, stream: str, entry: str, fields: dict[bytes, bytes]) -> Held | None:
        try:
            return Held(decode_as(Lease, fields.get(b"m", b"")), entry)
        except ContractError as error:
            number = fields.get(b"id", b"").decode(errors="replace")
            try:
                tombstone = Tombstone(
                    lease_id=number, prompt_id="", reason="malformed", detail=str(error)[:20_000], attempts=1
                )
            except ValidationError:  # no lease to close: keep the entry where a person can look at it
                await self.redis.xadd(self.keys.dead_letters, {**fields, b"reason": str(error).encode()[:20_000]})
                await self.redis.xack(stream, GROUP, entry)
                await self.redis.xdel(stream, entry)
            else:
                await self._close_failed(stream, entry, tombstone)
            return None

    async def heartbeat(self, held: Sequence[Held]) -> list[str]:
        """Keep the leases alive; returns the numbers of those that are lost, whose episodes must be cancelled."""
        lost: list[str] = []
        for purpose in {one.lease.purpose for one in held}:
            pairs = [part for one in held if one.lease.purpose == purpose for part in (one.lease.lease_id, one.entry)]
            reply = await self._heartbeat(
                keys=[self.keys.live, self.keys.leases(purpose)], args=[GROUP, self.consumer, *pairs]
            )
            lost.extend(number.decode() for number in reply)
        return lost

    async def emit(self, held: Held, trajectory: Trajectory) -> bool:
        """End the lease with its trajectory. False: it had already ended or moved; nothing was changed."""
        purpose = held.lease.purpose
        targets = [(self.keys.results(purpose), encode(trajectory))]
        return await self._end_entry(self.keys.leases(purpose), held.lease.lease_id, held.entry, targets)

    async def fail(self, held: Held, reason: FailReason, detail: str) -> bool:
        """End the lease with a tombstone, a dead letter and the closing update.

        False: it had already ended or moved.
        """
        tombstone = Tombstone(
            lease_id=held.lease.lease_id,
            prompt_id=held.lease.prompt_id,
            job=held.lease.job,
            reason=reason,
            detail=detail[:20_000],
            attempts=held.lease.attempts + 1,
        )
        return await self._close_failed(self.keys.leases(held.lease.purpose), held.entry, tombstone)

    async def _close_failed(self, stream: str, entry: str, tombstone: Tombstone) -> bool:
        purpose: Purpose = tombstone.lease_id.split(":", 1)[0]  # type: ignore[assignment]
        targets = [(self.keys.results(purpose), encode(tombstone)), (self.keys.dead_letters, encode(tombstone))]
        if purpose == "train":
            update = PosteriorUpdate(lease_id=tombstone.lease_id, prompt_id=tombstone.prompt_id, outcome="failed")
            targets.append((self.keys.posterior_updates, encode(update)))
        return await self._end_entry(stream, tombstone.lease_id, entry, targets)

    async def hand_over(self, held: Held, progress: Progress | None, count_attempt: bool) -> bool:
        """Put the lease back with what was done so far, for any replica to take. False: it had already ended or moved.

        Args:
            held: the lease.
            progress: the episode's state; None to start afresh.
            count_attempt: whether this attempt counts towards the bound (a fault does, an orderly stop does not).
        """
        lease = held.lease.model_copy(
            update={"progress": progress, "attempts": held.lease.attempts + int(count_attempt)}
        )
        stream = self.keys.leases(lease.purpose)
        return await self._end_entry(stream, lease.lease_id, held.entry, [(stream, encode(lease))])

    async def claim_dead(self, timeout_s: float, max_attempts: int) -> int:
        """Put back the leases whose holder has been silent for ``timeout_s``; fail those out of attempts.

        Returns how many.
        """
        moved = 0
        for purpose in ("train", "estimate", "evaluate"):
            stream, cursor = self.keys.leases(purpose), b""
            while cursor != b"0-0":  # one call looks at ten times as many entries, alive or not
                cursor, entries, _ = await self.redis.xautoclaim(
                    stream, GROUP, self.consumer, int(timeout_s * 1000), start_id=cursor or "0-0", count=CLAIM_COUNT
                )
                for entry, fields in entries:
                    moved += await self._move_dead(stream, entry.decode(), fields, max_attempts)
        return moved

    async def _move_dead(self, stream: str, entry: str, fields: dict[bytes, bytes], max_attempts: int) -> bool:
        held = await self._decode(stream, entry, fields)
        if held is None:
            return False
        if held.lease.attempts + 1 >= max_attempts:
            return await self.fail(held, "attempts", f"its holder went silent, {max_attempts} times in all")
        return await self.hand_over(held, held.progress, count_attempt=True)

    async def _end_entry(self, stream: str, number: str, entry: str, targets: Sequence[tuple[str, bytes]]) -> bool:
        reply = await self._end(
            keys=[self.keys.live, stream, *(target for target, _ in targets)],
            args=[number, entry, GROUP, *(payload for _, payload in targets)],
        )
        return reply is not None
