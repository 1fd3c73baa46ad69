"""The lease scripts against a real Redis: whoever ends a lease first ends it, and a second changes nothing."""

from __future__ import annotations

import itertools

import pytest
from redis.asyncio import Redis

from singlestream.contracts import PosteriorUpdate, Progress, Tombstone, Trajectory, decode, encode
from singlestream.streams import GROUP, Held, Keys, LeaseConsumer
from singlestream.streams.leases import CLAIM_COUNT
from tests.contracts.messages import lease, segments, trajectory


async def issue(redis: Redis, keys: Keys, number: str = "train:5f3a9c01:17") -> str:
    """Append a lease as the value store does."""
    one = lease(lease_id=number)
    entry = await redis.xadd(keys.leases(one.purpose), {"id": number, "m": encode(one)})
    await redis.hset(keys.live, number, entry)
    return entry.decode()


async def consumer(redis: Redis, keys: Keys, name: str) -> LeaseConsumer:
    one = LeaseConsumer(redis, keys, name)
    await one.join()
    return one


async def messages(redis: Redis, stream: str) -> list[object]:
    return [decode(fields[b"m"]) for _, fields in await redis.xrange(stream)]


async def pending(redis: Redis, keys: Keys) -> int:
    """Leases that count as held; the store leases less for each."""
    return int((await redis.xpending(keys.leases("train"), GROUP))["pending"])


async def test_emit_ends_a_lease_once(redis: Redis, keys: Keys) -> None:
    await issue(redis, keys)
    a = await consumer(redis, keys, "a")
    [held] = await a.take(["train"], 4, block_ms=1000)
    assert await a.emit(held, trajectory())
    assert not await a.emit(held, trajectory())
    assert not await a.fail(held, "grader_error", "too late")
    assert not await a.hand_over(held, None, count_attempt=False)
    [kept] = await messages(redis, keys.trajectories)
    assert isinstance(kept, Trajectory)
    assert await redis.xlen(keys.leases("train")) == await pending(redis, keys) == 0
    assert await redis.hlen(keys.live) == 0
    assert await redis.xlen(keys.dead_letters) == 0


async def test_fail_leaves_tombstone_dead_letter_and_closing_update(redis: Redis, keys: Keys) -> None:
    await issue(redis, keys)
    a = await consumer(redis, keys, "a")
    [held] = await a.take(["train"], 1, block_ms=1000)
    assert await a.fail(held, "grader_error", "Traceback: boom")
    [stone] = await messages(redis, keys.trajectories)
    assert isinstance(stone, Tombstone)
    assert stone.reason == "grader_error"
    assert [type(m) for m in await messages(redis, keys.dead_letters)] == [Tombstone]
    [update] = await messages(redis, keys.posterior_updates)
    assert isinstance(update, PosteriorUpdate)
    assert update.outcome == "failed"


async def test_results_of_other_purposes_do_not_reach_the_learner(redis: Redis, keys: Keys) -> None:
    number = "evaluate:5f3a9c01:1"
    await issue(redis, keys, number)
    a = await consumer(redis, keys, "a")
    [held] = await a.take(["train", "evaluate"], 1, block_ms=1000)
    assert await a.emit(held, trajectory(lease_id=number))
    assert await redis.xlen(keys.trajectories) == 0
    assert await redis.xlen(keys.scored) == 1


async def test_hand_over_keeps_the_tokens(redis: Redis, keys: Keys) -> None:
    await issue(redis, keys)
    a, b = await consumer(redis, keys, "a"), await consumer(redis, keys, "b")
    [held] = await a.take(["train"], 1, block_ms=1000)
    progress = Progress(segments=segments()[:2], turns=0, tool_calls=[], started_at_s=1.0)
    assert await a.hand_over(held, progress, count_attempt=False)
    [again] = await b.take(["train"], 1, block_ms=1000)
    assert again.lease.attempts == 0
    assert again.lease.progress is not None
    assert again.lease.progress.segments[1].token_ids.tolist() == [8, 9]
    assert not await a.emit(held, trajectory())
    assert await b.emit(again, trajectory())
    assert await redis.xlen(keys.trajectories) == 1


async def test_a_silent_holders_lease_is_claimed_and_its_return_changes_nothing(redis: Redis, keys: Keys) -> None:
    await issue(redis, keys)
    a, b = await consumer(redis, keys, "a"), await consumer(redis, keys, "b")
    [zombie] = await a.take(["train"], 1, block_ms=1000)
    assert await b.claim_dead(timeout_s=0.0, max_attempts=3) == 1
    assert await a.heartbeat([zombie]) == [zombie.lease.lease_id]
    assert not await a.emit(zombie, trajectory())
    [again] = await b.take(["train"], 1, block_ms=1000)
    assert again.lease.attempts == 1
    assert await b.heartbeat([again]) == []


async def test_heartbeats_keep_a_lease(redis: Redis, keys: Keys) -> None:
    entry = await issue(redis, keys)
    a, b = await consumer(redis, keys, "a"), await consumer(redis, keys, "b")
    [held] = await a.take(["train"], 1, block_ms=1000)
    await redis.xclaim(keys.leases("train"), GROUP, "a", 0, [entry], idle=3_600_000, justid=True)
    assert await a.heartbeat([held]) == []
    assert await b.claim_dead(timeout_s=600.0, max_attempts=3) == 0


async def test_a_dead_lease_behind_many_living_ones_is_claimed(redis: Redis, keys: Keys) -> None:
    a, b = await consumer(redis, keys, "a"), await consumer(redis, keys, "b")
    for number in range(1, 15 * CLAIM_COUNT + 1):
        last = await issue(redis, keys, f"train:5f3a9c01:{number}")
    assert len(await a.take(["train"], 15 * CLAIM_COUNT, block_ms=1000)) == 15 * CLAIM_COUNT
    await redis.xclaim(keys.leases("train"), GROUP, "a", 0, [last], idle=3_600_000, justid=True)
    assert await b.claim_dead(timeout_s=600.0, max_attempts=3) == 1


async def test_a_claimed_lease_is_lost_before_it_is_put_back(redis: Redis, keys: Keys) -> None:
    """The claimer may die between the two; its claim must not go back to the holder it found silent."""
    entry = await issue(redis, keys)
    a = await consumer(redis, keys, "a")
    held = await a.take(["train"], 1, block_ms=None)
    assert await a.heartbeat(held) == []
    await redis.xclaim(keys.leases("train"), GROUP, "b", 0, [entry])
    assert await a.heartbeat(held) == ["train:5f3a9c01:17"]
    [owned] = await redis.xpending_range(keys.leases("train"), GROUP, "-", "+", 10)
    assert owned["consumer"] == b"b"


async def test_a_lease_out_of_attempts_fails(redis: Redis, keys: Keys) -> None:
    await issue(redis, keys)
    a = await consumer(redis, keys, "a")
    for _ in range(2):
        await a.take(["train"], 1, block_ms=1000)
        await a.claim_dead(timeout_s=0.0, max_attempts=2)
    [stone] = await messages(redis, keys.trajectories)
    assert isinstance(stone, Tombstone)
    assert (stone.reason, stone.attempts) == ("attempts", 2)


async def test_a_damaged_lease_is_a_tombstone(redis: Redis, keys: Keys) -> None:
    number = "train:5f3a9c01:3"
    entry = await redis.xadd(keys.leases("train"), {"id": number, "m": b"\x00rubbish"})
    await redis.hset(keys.live, number, entry)
    nameless = await redis.xadd(keys.leases("train"), {"id": "???", "m": b"\x00rubbish"})
    a = await consumer(redis, keys, "a")
    assert await a.take(["train"], 4, block_ms=100) == []
    [stone] = await messages(redis, keys.trajectories)
    assert isinstance(stone, Tombstone)
    assert (stone.lease_id, stone.reason) == (number, "malformed")
    assert await redis.xlen(keys.dead_letters) == 2
    assert await redis.xlen(keys.leases("train")) == 0
    assert nameless


ZOMBIE = ("heartbeat", "emit", "hand_over", "fail")
SUCCESSORS = (
    ("claim", "take", "heartbeat", "emit"),
    ("claim", "take", "hand_over", "fail"),
    ("claim", "take", "claim"),
)
"""What others do with the lease of a stopped holder, in that order, until it continues."""


class Rivals:
    """A holder that was stopped and continues (a), and its successor (b), who fight for one lease.

    Args:
        redis: a client.
        keys: of a run of their own.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self.replicas = {name: LeaseConsumer(redis, keys, name) for name in "ab"}
        self.held: dict[str, Held | None] = {"a": None, "b": None}
        self.ends = 0

    async def begin(self) -> None:
        await issue(self.redis, self.keys)
        await self.replicas["a"].join()
        [self.held["a"]] = await self.replicas["a"].take(["train"], 1, block_ms=1000)

    async def act(self, name: str, action: str) -> None:
        one, held = self.replicas[name], self.held[name]
        if action == "claim":
            await one.claim_dead(timeout_s=0.0, max_attempts=10)
        elif action == "take":
            self.held[name] = next(iter(await one.take(["train"], 1, block_ms=None)), None)
        elif held is not None and action == "heartbeat":
            entry = await self.redis.hget(self.keys.live, held.lease.lease_id)
            assert bool(await one.heartbeat([held])) == (entry is None or entry.decode() != held.entry)
        elif held is not None and action == "hand_over":
            progress = Progress(segments=segments()[:2], turns=0, tool_calls=[], started_at_s=1.0)
            await one.hand_over(held, progress, count_attempt=False)
        elif held is not None:
            end = one.emit(held, trajectory()) if action == "emit" else one.fail(held, "grader_error", "raised")
            self.ends += await end

    async def finish(self) -> None:
        """Whoever is left takes what is left; the lease must have ended exactly once, by whichever hand."""
        last = await consumer(self.redis, self.keys, "c")
        await last.claim_dead(timeout_s=0.0, max_attempts=10)
        for held in await last.take(["train"], 4, block_ms=None):
            self.ends += await last.emit(held, trajectory())
        assert self.ends == 1
        ended = await messages(self.redis, self.keys.trajectories)
        failed = [one for one in ended if isinstance(one, Tombstone)]
        assert len(ended) == 1
        assert await self.redis.xlen(self.keys.dead_letters) == len(failed)
        assert await self.redis.xlen(self.keys.posterior_updates) == len(failed)
        assert await self.redis.hlen(self.keys.live) == await self.redis.xlen(self.keys.leases("train")) == 0
        assert await pending(self.redis, self.keys) == 0


@pytest.mark.parametrize("others", SUCCESSORS)
async def test_a_stopped_holder_that_continues_never_ends_a_lease_twice(
    redis: Redis, keys: Keys, others: tuple[str, ...]
) -> None:
    wakes = range(len(others) + 1)
    for zombie, wake in itertools.product(itertools.permutations(ZOMBIE), wakes):
        rivals = Rivals(redis, Keys(f"{keys.run}-{'-'.join(zombie)}-{wake}"))
        await rivals.begin()
        for name, actions in (("b", others[:wake]), ("a", zombie), ("b", others[wake:])):
            for action in actions:
                await rivals.act(name, action)
        try:
            await rivals.finish()
        except AssertionError as error:
            raise AssertionError(f"{others}; after {wake} of them {zombie}") from error


async def test_take_never_exceeds_the_free_slots(redis: Redis, keys: Keys) -> None:
    for purpose in ("train", "evaluate"):
        for n in range(1, 4):
            await issue(redis, keys, f"{purpose}:5f3a9c01:{n}")
    a = await consumer(redis, keys, "a")
    held: list[Held] = []
    for count in (2, 1, 3):
        taken = await a.take(["evaluate", "train"], count, block_ms=1000)
        assert len(taken) == count
        held += taken
    assert [one.lease.purpose for one in held] == ["evaluate"] * 3 + ["train"] * 3
