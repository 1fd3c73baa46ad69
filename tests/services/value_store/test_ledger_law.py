"""The ledger adds up, memory is what Redis holds, and each lease counts once, after any sequence of events."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.value_store.jobs import Job
from services.value_store.memory import load_memory
from services.value_store.store import Store
from singlestream.contracts import PosteriorUpdate, Sampling, Trajectory
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Held, Keys, connect
from singlestream.streams.ledger import read_ledger
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

EVENTS = ("issue", "take", "finish", "fail", "hand over", "train", "stale", "repeat", "settle", "restart", "job")
_runs = itertools.count(1)


class Story:
    """One sequence of events, with its own choices drawn from a seed."""

    def __init__(self, store: Store, world: World, seed: int) -> None:
        self.store, self.world, self.rng = store, world, random.Random(seed)
        self.held: list[Held] = []
        self.finished: list[Trajectory] = []
        self.sent: list[PosteriorUpdate] = []

    def pick(self, items: list) -> object:  # type: ignore[type-arg]
        return items.pop(self.rng.randrange(len(items)))

    async def happen(self, event: str) -> None:
        store, world = self.store, self.world
        if event == "issue":
            await store.issue(self.rng.randrange(1, 9))
        elif event == "take":
            await world.replica.claim_dead(0.0, max_attempts=100)
            self.held += await world.take(3)
        elif event in ("finish", "fail", "hand over") and self.held:
            await self.end(event, self.pick(self.held))  # type: ignore[arg-type]
        elif event in ("train", "stale", "repeat"):
            await self.train(event)
        elif event == "settle":
            await settle(store)
        elif event == "restart":
            self.store = Store(store.config, store.redis)
            await wake(self.store)
        elif event == "job":
            ids = [prompt.prompt_id for prompt in self.rng.sample(make_prompts(12), 2)]
            sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0)
            await store.create_job(Job(f"{self.rng.getrandbits(48):012x}", "estimate", ids, 2, sampling, 1.0))

    async def end(self, event: str, held: Held) -> None:
        replica = self.world.replica
        if event == "finish":
            trajectory = make_trajectory(held.lease, self.rng.random())
            if await replica.emit(held, trajectory) and held.lease.purpose == "train":
                self.finished.append(trajectory)
        elif event == "fail":
            await replica.fail(held, "grader_error", "boom")
        else:
            await replica.hand_over(held, None, count_attempt=True)

    async def train(self, event: str) -> None:
        learner = self.world.learner
        if event == "repeat" and self.sent:
            await learner.send_updates(self.rng.sample(self.sent, self.rng.randint(1, len(self.sent))))
        elif event != "repeat" and self.finished:
            outcome = "trained" if event == "train" else "stale"
            update = evidence(self.pick(self.finished), outcome)  # type: ignore[arg-type]
            self.sent.append(update)
            await learner.send_updates([update])


async def live(url: str, events: list[str], seed: int) -> None:
    keys, redis = Keys(f"law{next(_runs)}"), connect(url)
    try:
        store, world = Store(make_config(keys), redis), World(redis, keys)
        await world.start()
        await wake(store)
        await store.upsert(make_prompts(12), [None] * 12)
        await world.publish(0)
        await store.set_training("running")
        await settle(store)
        story = Story(store, world, seed)
        for event in events:
            await story.happen(event)
            counts = await read_ledger(redis, keys)
            assert all(one.adds_up for one in counts.values())
            assert counts["train"].outstanding <= 8
        await settle(story.store)
        same_memory(story.store, await load_memory(Store(store.config, redis).streams, store.config))
        table, ended = story.store.memory.table, (await read_ledger(redis, keys))["train"].ended
        assert table.visits.sum() == ended["trained"] + ended["stale"] == len({one.lease_id for one in story.sent})
    finally:
        await redis.aclose()


@pytest.mark.timeout(300)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(EVENTS), min_size=10, max_size=60), st.integers(0, 2**32))
def test_the_ledger_adds_up_whatever_happens(redis_server: EmbeddedRedis, events: list[str], seed: int) -> None:
    asyncio.run(live(redis_server.url, events, seed))
