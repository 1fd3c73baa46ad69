"""The learner's side.

Read trajectories in stream order, publish versions, send updates, move the resume pointer, each behind the fence.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from redis.asyncio import Redis

from singlestream.contracts import PolicyVersion, PosteriorUpdate, decode_as, encode
from singlestream.errors import CheckpointError, Fenced
from singlestream.streams.anchors import PUT_ANCHORS, read_anchors
from singlestream.streams.keys import Keys

TAKE_OVER = """
-- KEYS: fence, lineage   ARGV: token   returns the new lineage
redis.call('SET', KEYS[1], ARGV[1])
return redis.call('INCR', KEYS[2])
"""

PUBLISH = """
-- KEYS: fence, policy_versions, clock   ARGV: token, version, z, payload, versions kept
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('HSETNX', KEYS[3], ARGV[2], ARGV[3])
redis.call('XADD', KEYS[2], '*', 'id', '', 'm', ARGV[4])
if redis.call('XLEN', KEYS[2]) > tonumber(ARGV[5]) then
  local second = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 2)[2][1]
  redis.call('XTRIM', KEYS[2], 'MINID', second)
end
return true
"""

VERSIONS_KEPT = 1024
"""Newest policy versions in their stream: replicas need the last one, the value store lists them; a large model's
manifest has 50 KB."""

SEND = """
-- KEYS: fence, posterior_updates   ARGV: token, (lease, payload)...
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
for i = 2, #ARGV, 2 do redis.call('XADD', KEYS[2], '*', 'id', ARGV[i], 'm', ARGV[i + 1]) end
return true
"""

RESUME_FROM = """
-- KEYS: fence, resume, trajectories   ARGV: token, checkpoint, oldest entry still needed
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('XTRIM', KEYS[3], 'MINID', ARGV[3])
return true
"""

DEAD_LETTER = """
-- KEYS: fence, dead_letters   ARGV: token, lease, payload, reason
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('XADD', KEYS[2], '*', 'id', ARGV[2], 'm', ARGV[3], 'reason', ARGV[4])
return true
"""

ANCHORS_PER_SCRIPT = 64
"""A kept response of 16k tokens has about 130 KB."""

HEARTBEAT = """
-- KEYS: fence, learner   ARGV: token, json
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('SET', KEYS[2], ARGV[2])
return true
"""

MAX_ARGS = 1024
"""Updates in one script call: Lua's stack bounds the arguments, and a long script holds up everyone."""


class LearnerStreams:
    """What learner rank 0 reads and writes. Every write raises `Fenced` once another learner has taken over.

    All writes may be repeated after a lost reply: a version or an update that stands twice in a stream changes nothing
    more.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self.token = secrets.token_hex(8)
        self._scripts = {
            name: redis.register_script(text)
            for name, text in (
                ("take_over", TAKE_OVER),
                ("publish", PUBLISH),
                ("send", SEND),
                ("resume_from", RESUME_FROM),
                ("dead_letter", DEAD_LETTER),
                ("heartbeat", HEARTBEAT),
                ("put_anchors", PUT_ANCHORS),
            )
        }

    async def take_over(self) -> int:
        """Become the one learner of the run; returns the new lineage."""
        return int(
            await self._scripts["take_over"](keys=[self.keys.fence("learner"), self.keys.lineage], args=[self.token])
        )

    async def is_known(self) -> bool:
        """Whether a learner of this run has ever taken over: False on a Redis that is new, or has lost its data."""
        return bool(await self.redis.exists(self.keys.lineage))

    async def drift_clock(self) -> dict[int, float]:
        """Version → z, of every version that was ever published."""
        return {int(version): float(z) for version, z in (await self.redis.hgetall(self.keys.clock)).items()}

    async def is_paused(self) -> bool:
        """Whether training is paused, so that no trajectory can be expected."""
        return bool(await self.redis.get(self.keys.state) == b"paused")

    async def _fenced(self, script: str, keys: Sequence[str], args: Sequence[str | bytes | float]) -> None:
        reply = await self._scripts[script](keys=[self.keys.fence("learner"), *keys], args=[self.token, *args])
        if reply is None:
            raise Fenced(f"another learner has taken over run {self.keys.run!r}; this one stops")

    async def read(self, after: str, count: int, block_ms: int | None) -> list[tuple[str, bytes, bytes]]:
        """Entries of the trajectory stream after the cursor, as (entry, lease number, encoded message).

        Waits ``block_ms`` for the first. None does not wait at all; Redis ends the shortest wait after up to 100 ms.

        No group and no pending list takes part, so what is read depends on the cursor and the stream alone.
        """
        reply = await self.redis.xread({self.keys.trajectories: after}, count=count, block=block_ms)
        entries = reply[0][1] if reply else []
        return [(entry.decode(), fields.get(b"id", b""), fields.get(b"m", b"")) for entry, fields in entries]

    async def check_kept(self, cursor: str) -> None:
        """Raise `CheckpointError` where entries behind a resumed checkpoint's cursor are gone.

        The entry at the cursor of the oldest checkpoint kept stays, so only an older checkpoint, or Redis' data of
        another time, has none at its cursor or before.
        """
        first = await self.redis.xrange(self.keys.trajectories, count=1)
        if cursor != "0-0" and not (first and _place(first[0][0].decode()) <= _place(cursor)):
            found = f"begins at {first[0][0].decode()}" if first else "is empty"
            raise CheckpointError(
                f"the checkpoint ends at entry {cursor} of {self.keys.trajectories}, which {found}: what it would "
                "train next has been trimmed. Resume from a newer checkpoint, or start a run of another name"
            )

    async def publish(self, version: PolicyVersion) -> None:
        """Announce a version. Its z is written once: the first publication of a version wins."""
        await self._fenced(
            "publish",
            [self.keys.policy_versions, self.keys.clock],
            [str(version.version), repr(version.z), encode(version), str(VERSIONS_KEPT)],
        )

    async def send_updates(self, updates: Sequence[PosteriorUpdate]) -> None:
        """Close leases."""
        for start in range(0, len(updates), MAX_ARGS):
            part = updates[start : start + MAX_ARGS]
            args = [field for update in part for field in (update.lease_id, encode(update))]
            await self._fenced("send", [self.keys.posterior_updates], args)

    async def anchors(self, prompt_ids: Sequence[str]) -> list[bytes | None]:
        """What is kept of each prompt's previous response; None where nothing is."""
        return await read_anchors(self.redis, self.keys, prompt_ids)

    async def put_anchors(self, anchors: Sequence[tuple[str, bytes]], most_bytes: int) -> None:
        """Keep (lease, packed response) where the lease is outstanding; of all kept, the oldest beyond a bound go."""
        keys = [self.keys.anchors, self.keys.anchor_ages, self.keys.anchor_counts, self.keys.outstanding("train")]
        for start in range(0, len(anchors), ANCHORS_PER_SCRIPT):
            part = [field for pair in anchors[start : start + ANCHORS_PER_SCRIPT] for field in pair]
            await self._fenced("put_anchors", keys, [str(most_bytes), *part])

    async def dead_letter(self, number: str, message: bytes, reason: str) -> None:
        """Keep a message that could not be used."""
        await self._fenced("dead_letter", [self.keys.dead_letters], [number, message, reason])

    async def heartbeat(self, state: str) -> None:
        """Say how the learner is, as the JSON that `Keys.learner` documents."""
        await self._fenced("heartbeat", [self.keys.learner], [state])

    async def resume_name(self) -> str | None:
        """Name of the checkpoint that the resume pointer holds; None before the first."""
        name = await self.redis.get(self.keys.resume)
        return None if name is None else name.decode()

    async def resume_from(self, checkpoint: str, oldest_needed: str) -> None:
        """Move the resume pointer and trim what no kept checkpoint needs.

        Args:
            checkpoint: name of the newest complete checkpoint.
            oldest_needed: cursor of the oldest checkpoint that is kept. That entry itself is already consumed and
                stays.
        """
        await self._fenced("resume_from", [self.keys.resume, self.keys.trajectories], [checkpoint, oldest_needed])


def _place(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number)


async def newest_version(redis: Redis, keys: Keys) -> PolicyVersion | None:
    """The last published version, or None before the first."""
    entries = await redis.xrevrange(keys.policy_versions, count=1)
    return decode_as(PolicyVersion, entries[0][1][b"m"]) if entries else None
