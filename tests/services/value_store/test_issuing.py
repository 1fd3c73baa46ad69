"""How many leases are issued, and for whom: the replicas' demand, shared by jobs and training."""

from __future__ import annotations

import json
import time

import pytest
from redis.asyncio import Redis

from services.value_store import loops
from services.value_store.issuing import demand, parse_replicas, split_demand
from services.value_store.jobs import Job
from singlestream.streams import Keys
from tests.services.value_store.test_store import SAMPLING, start
from tests.services.value_store.world import make_prompts


@pytest.mark.parametrize(
    ("wanted", "jobs", "training", "shares"),
    [(6, 10, 10, (3, 3)), (6, 1, 10, (1, 5)), (6, 10, 1, (5, 1)), (5, 9, 9, (3, 2)), (4, 0, 0, (0, 0))],
)
def test_demand_is_shared(wanted: int, jobs: int, training: int, shares: tuple[int, int]) -> None:
    assert split_demand(wanted, jobs, training) == shares


def test_demand_follows_slots_and_what_is_unread() -> None:
    assert demand(slots=0, held=0, unread=0) == 0
    assert demand(slots=64, held=0, unread=0) == 64 + 16
    assert demand(slots=64, held=64, unread=0) == 16
    assert demand(slots=64, held=64, unread=20) == 0
    assert demand(slots=4, held=9, unread=1) == 7


def test_a_report_that_cannot_be_read_counts_for_nothing() -> None:
    good = json.dumps({"slots": 4, "in_use": 1, "version": None, "lineage": None, "at_s": 100.0}).encode()
    raw = {b"a": good, b"b": b"rubbish", b"c": b"[1]", b"d": b'{"slots": 4}'}
    [replica] = parse_replicas(raw)
    assert replica.name == "a"
    assert replica.alive(109.0)
    assert not replica.alive(110.1)


async def test_a_job_and_training_share_the_demand(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    ids = [p.prompt_id for p in make_prompts(10)]
    await store.create_job(Job("0123456789ab", "evaluate", ids, 1, SAMPLING, 1.0))
    await loops._wanted(store)  # evaluation has its share of the living replicas' slots
    assert await store.issue(6) == 6
    assert [held.lease.purpose for held in await world.take()].count("train") == 3


async def test_what_a_killed_replica_reported_last_goes_after_an_hour(redis: Redis, keys: Keys) -> None:
    store, _ = await start(redis, keys)
    await redis.hset(keys.replicas, "killed", json.dumps({"slots": 4, "in_use": 4, "at_s": time.time() - 3601}))
    for _ in range(2):
        await loops._wanted(store)
    assert [replica.name for replica in store.replicas] == ["r1"]
    assert await redis.hkeys(keys.replicas) == [b"r1"]
