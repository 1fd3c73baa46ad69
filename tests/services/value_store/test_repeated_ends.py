"""An end that stands several times in one stretch of a stream is one end, of a failed lease too (I1)."""

from __future__ import annotations

from redis.asyncio import Redis

from services.value_store.jobs import Job
from singlestream.contracts import PosteriorUpdate, Sampling, encode
from singlestream.streams import Keys
from tests.services.value_store.test_store import start
from tests.services.value_store.world import make_prompts, make_trajectory, settle


async def test_a_failure_told_three_times_at_once_is_one(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    await store.issue(2)
    [held, _] = await world.take()
    lease = held.lease
    failed = PosteriorUpdate(lease_id=lease.lease_id, prompt_id=lease.prompt_id, outcome="failed")
    await world.learner.send_updates([failed] * 3)
    await settle(store)
    counts = (await world.ledger())["train"]
    assert (counts.leased, counts.outstanding, counts.ended["failed"]) == (2, 1, 1)
    assert counts.adds_up and store.memory.duplicates == 2
    assert store.memory.table.in_flight.sum() == 1


async def test_a_result_that_stands_twice_is_scored_once(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20)
    await store.create_job(Job("0123456789ab", "estimate", [make_prompts(1)[0].prompt_id], 2, sampling, 1.0))
    assert await store.issue(2) == 2
    for held in await world.take():
        if held.lease.purpose == "estimate":
            result = encode(make_trajectory(held.lease, 1.0))
            for _ in range(2):
                await redis.xadd(keys.scored, {"id": held.lease.lease_id, "m": result})
    await settle(store)
    counts = (await world.ledger())["estimate"]
    assert counts.adds_up and counts.leased == counts.outstanding + counts.ended["scored"]
    assert store.memory.duplicates == counts.ended["scored"] > 0
    assert store.memory.jobs["0123456789ab"].summary()["done"] == counts.ended["scored"]
