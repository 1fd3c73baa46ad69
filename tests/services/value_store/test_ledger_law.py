"""The ledger adds up, memory is what Redis holds, and each lease counts once, after any sequence of events."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from services.value_store import evaluations, loops
from services.value_store.jobs import Job
from services.value_store.memory import load_memory
from services.value_store.store import Store
from singlestream.contracts import EndOfRun, PosteriorUpdate, Sampling, Trajectory, decode
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Held, Keys, connect
from singlestream.streams.ledger import LedgerCounts, read_ledger
from tests.services.value_store.test_store import same_memory
from tests.services.value_store.world import (
    World,
    evidence,
    make_config,
    make_prompts,
    make_trajectory,
    settle,
    wake,
)

EVENTS = (
    *("issue", "take", "finish", "train", "settle") * 4,
    *("reclaim", "fail", "hand_over", "stale", "repeat", "restart", "publish", "wind_down"),
    *("estimate", "evaluate", "cancel_job"),
)
"""Methods of `Story`, the most of them in the way that a lease goes; ``stop`` is apart, since little follows it."""
PROMPTS, BATCH, RUN_AHEAD = 12, 4, 8
HAPPENINGS = st.lists(st.sampled_from(EVENTS), min_size=20, max_size=60)
T = TypeVar("T")
_runs = itertools.count(1)


class Story:
    """One sequence of events, with its own choices drawn from a seed."""

    def __init__(self, store: Store, world: World, seed: int) -> None:
        self.store, self.world, self.rng = store, world, random.Random(seed)
        self.held: list[Held] = []
        self.finished: list[Trajectory] = []
        self.sent: list[PosteriorUpdate] = []
        self.version = 0

    def some(self, items: list[T]) -> list[T]:
        """Some of the items, at least one where there are any; they are taken out."""
        self.rng.shuffle(items)
        count = self.rng.randint(1, len(items)) if items else 0
        taken, items[:] = items[:count], items[count:]
        return taken

    async def issue(self) -> None:
        await loops._wanted(self.store)  # the replicas that live, for evaluations
        await self.store.issue(self.rng.randrange(1, 9))

    async def take(self) -> None:
        self.held += await self.world.take(self.rng.randint(1, 8))

    async def reclaim(self) -> None:
        await self.world.replica.claim_dead(0.0, max_attempts=100)

    async def finish(self) -> None:
        for held in self.some(self.held):
            trajectory = make_trajectory(held.lease, self.rng.random())
            if await self.world.replica.emit(held, trajectory) and held.lease.purpose == "train":
                self.finished.append(trajectory)

    async def fail(self) -> None:
        for held in self.some(self.held):
            await self.world.replica.fail(held, "grader_error", "boom")

    async def hand_over(self) -> None:
        for held in self.some(self.held):
            await self.world.replica.hand_over(held, None, count_attempt=True)

    async def train(self, outcome: str = "trained") -> None:
        updates = [evidence(one, outcome) for one in self.some(self.finished)]
        self.sent += updates
        await self.world.learner.send_updates(updates)

    async def stale(self) -> None:
        await self.train("stale")

    async def repeat(self) -> None:
        await self.world.learner.send_updates(self.rng.sample(self.sent, self.rng.randint(0, len(self.sent))))

    async def settle(self) -> None:
        await settle(self.store)

    async def restart(self) -> None:
        self.store = Store(self.store.config, self.store.redis)
        await wake(self.store)

    async def publish(self) -> None:
        self.version += 1
        await self.world.publish(self.version)

    async def estimate(self, purpose: str = "estimate") -> None:
        ids = [prompt.prompt_id for prompt in self.rng.sample(make_prompts(PROMPTS), 2)]
        number, sampling = f"{self.rng.getrandbits(48):012x}", Sampling(temperature=1.0, top_p=1.0, top_k=0)
        await self.store.create_job(Job(number, purpose, ids, 2, sampling, 1.0))  # type: ignore[arg-type]

    async def evaluate(self) -> None:
        await self.estimate("evaluate")

    async def cancel_job(self) -> None:
        if jobs := list(self.store.memory.jobs):
            await evaluations.cancel_job(self.store, self.rng.choice(jobs))

    async def stop(self) -> None:
        if self.store.memory.state == "running":
            await self.store.set_training("stopped")

    async def wind_down(self) -> None:
        await self.store.wind_down()


def check(store: Store, counts: Mapping[str, LedgerCounts], total: int) -> None:
    """What holds after every event."""
    assert all(one.adds_up for one in counts.values())
    train = counts["train"]
    assert train.outstanding <= RUN_AHEAD
    assert train.ended["trained"] + train.outstanding <= total
    open_ = [lease.prompt_id for lease in store.memory.open["train"].values()]
    assert len(set(open_)) == len(open_), "a prompt in flight was drawn (I3)"


async def check_end(redis: Redis, keys: Keys, story: Story, total: int) -> None:
    """What holds once everything in the streams has been applied."""
    store, counts = story.store, await read_ledger(redis, keys)
    train, state = counts["train"], store.memory.state
    same_memory(store, await load_memory(Store(store.config, redis).streams, store.config))
    visits = int(store.memory.table.visits.sum())
    assert visits == train.ended["trained"] + train.ended["stale"] == len({one.lease_id for one in story.sent})
    assert (train.ended["trained"] == total) == (state == "finished") or state in ("stopping", "stopped")
    ends = [decode(fields[b"m"]) for _, fields in await redis.xrange(keys.trajectories)]
    if state == "stopped":
        assert isinstance(ends[-1], EndOfRun), "behind every lease's end"
        assert len(ends) == train.leased + 1
    else:
        assert not any(isinstance(one, EndOfRun) for one in ends)


async def live(url: str, events: list[str], seed: int, total_steps: int) -> None:
    keys, redis = Keys(f"law{next(_runs)}"), connect(url)
    try:
        store, world = Store(make_config(keys, total_steps=total_steps), redis), World(redis, keys)
        await world.start()
        await wake(store)
        await store.upsert(make_prompts(PROMPTS), [None] * PROMPTS)
        await world.publish(0)
        await store.set_training("running")
        await settle(store)
        story = Story(store, world, seed)
        for event in events:
            await getattr(story, event)()
            check(story.store, await read_ledger(redis, keys), total_steps * BATCH)
        await story.wind_down()
        await settle(story.store)
        await check_end(redis, keys, story, total_steps * BATCH)
    finally:
        await redis.aclose()


@pytest.mark.timeout(300)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(HAPPENINGS, st.just(()) | HAPPENINGS, st.integers(0, 2**32), st.sampled_from([2, 50]))
def test_the_ledger_adds_up_whatever_happens(
    redis_server: EmbeddedRedis, before: list[str], after_a_stop: list[str], seed: int, total_steps: int
) -> None:
    events = [*before, "stop", *after_a_stop] if after_a_stop else before
    asyncio.run(live(redis_server.url, events, seed, total_steps))
