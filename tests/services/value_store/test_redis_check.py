"""What the store reads of Redis itself, once a second: how full it is, and whether it is still the same process."""

from __future__ import annotations

from redis.asyncio import Redis

from services.value_store.jobs import Job
from services.value_store.loops import check_redis
from singlestream.contracts import Sampling
from singlestream.streams import Keys
from tests.services.value_store.test_store import start
from tests.services.value_store.world import make_prompts, wake


async def test_above_its_share_of_memory_neither_jobs_nor_training_are_leased(redis: Redis, keys: Keys) -> None:
    store, _ = await start(redis, keys)
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20)
    await store.create_job(Job("0123456789ab", "estimate", [make_prompts(1)[0].prompt_id], 2, sampling, 1.0))
    try:
        await redis.config_set("maxmemory", (await redis.info("memory"))["used_memory"])
        await check_redis(store)
        assert await store.issue(100, pinned=100) == 0
    finally:
        await redis.config_set("maxmemory", 0)
    await check_redis(store)
    assert await store.issue(100) == 2 + 8, "the job's items, and (max_staleness + 1) · batch"


async def test_another_redis_process_means_that_memory_is_read_anew(redis: Redis, keys: Keys) -> None:
    store, _ = await start(redis, keys)
    await check_redis(store)
    assert store.waiting_for is None
    epoch, store.memory.redis_run_id = store.memory.epoch, "0" * 40
    await check_redis(store)
    assert store.waiting_for is not None and "Redis has restarted" in store.waiting_for
    await wake(store)
    assert store.waiting_for is None and store.memory.epoch != epoch
