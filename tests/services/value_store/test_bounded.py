"""What would grow without end is bounded, and what is dropped is counted."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from services.value_store import evaluations, loops, metrics
from services.value_store.jobs import Job, surplus
from services.value_store.memory import load_memory
from services.value_store.store import Store
from singlestream.contracts import Sampling
from singlestream.streams import GROUP, Keys
from tests.services.value_store.world import World, make_config, make_prompts, make_trajectory, settle, wake

SAMPLING = Sampling(temperature=0.6, top_p=0.95, top_k=20)
BOUNDS = {"dead_letters_kept": 3, "finished_jobs_kept": 2}


async def awake(redis: Redis, keys: Keys) -> tuple[Store, World]:
    store, world = Store(make_config(keys, value_store=BOUNDS), redis), World(redis, keys)
    await world.start()
    await wake(store)
    await store.upsert(make_prompts(4), [None] * 4)
    return store, world


def make_job(number: int, n: int = 1, purpose: str = "evaluate") -> Job:
    return Job(f"{number:012x}", purpose, [p.prompt_id for p in make_prompts(2)], n, SAMPLING, float(number))  # type: ignore[arg-type]


async def test_dead_letters_are_dropped_beyond_their_bound_and_counted(redis: Redis, keys: Keys) -> None:
    store, _ = await awake(redis, keys)
    for number in range(5):
        await redis.xadd(keys.posterior_updates, {"id": "", "m": b"rubbish %d" % number})
        await settle(store)
    await loops.tidy(store)
    await loops.tidy(store)
    assert [fields[b"m"] for _, fields in await redis.xrange(keys.dead_letters)] == [
        b"rubbish %d" % i for i in (2, 3, 4)
    ]
    memory = await load_memory(Store(store.config, redis).streams, store.config)
    assert store.memory.dead_letters_dropped == memory.dead_letters_dropped == 2
    assert b'value_store_dropped_total{what="dead_letters"} 2.0' in metrics.render(store)


async def test_consumers_of_dead_replicas_go_but_not_with_what_they_hold(redis: Redis, keys: Keys) -> None:
    store, world = await awake(redis, keys)
    await store.create_job(make_job(1))
    assert await store.issue(100) == 2
    [held] = await world.take(1)
    for purpose in ("train", "evaluate"):
        await redis.xgroup_createconsumer(keys.leases(purpose), GROUP, "killed")
    assert await store.streams.tidy(3, idle_s=60.0) == (0, 0), "it may only be slow"
    await asyncio.sleep(0.01)
    assert await store.streams.tidy(3, idle_s=0.0) >= (0, 2)
    assert [one["name"] for one in await redis.xinfo_consumers(keys.leases("evaluate"), GROUP)] == [b"r1"]
    assert await world.replica.emit(held, make_trajectory(held.lease, 1.0))


async def test_finished_jobs_are_dropped_with_their_results_as_new_ones_come(redis: Redis, keys: Keys) -> None:
    store, world = await awake(redis, keys)
    for number in range(1, 5):
        await store.create_job(make_job(number))
        assert await store.issue(100) == 2
        await world.play()
        await settle(store)
    await store.create_job(make_job(5))
    left = [f"{number:012x}" for number in (3, 4, 5)]
    memory = await load_memory(Store(store.config, redis).streams, store.config)
    assert sorted(store.memory.jobs) == sorted(memory.jobs) == left
    assert sorted(map(bytes.decode, await redis.hkeys(keys.jobs))) == left
    assert await redis.exists(*(keys.job_results(f"{number:012x}") for number in range(1, 6))) == 2
    assert store.memory.jobs_dropped == memory.jobs_dropped == 2


def test_running_jobs_are_no_surplus() -> None:
    jobs = [make_job(number) for number in range(4)]
    jobs[1].finished_at_s, jobs[2].finished_at_s, jobs[3].finished_at_s = 9.0, 7.0, 8.0
    assert surplus(jobs, 1) == [jobs[2].job_id, jobs[3].job_id]
    assert surplus(jobs, 5) == []


async def test_two_requests_to_resume_make_one_job(redis: Redis, keys: Keys) -> None:
    store, _ = await awake(redis, keys)
    asked = [evaluations.create_job(store, make_job(number), resume=True) for number in (1, 2, 3)]
    assert {job.job_id for job in await asyncio.gather(*asked)} == {make_job(1).job_id}
    assert len(store.memory.jobs) == await redis.hlen(keys.jobs) == 1
    other = await evaluations.create_job(store, make_job(4, n=2), resume=True)
    assert other.job_id == make_job(4).job_id


async def test_queues_ages_and_the_next_draw_are_metrics(redis: Redis, keys: Keys) -> None:
    store, _ = await awake(redis, keys)
    seconds, _ = await redis.time()
    await redis.xadd(keys.posterior_updates, {"id": "", "m": b"rubbish"}, id=f"{(seconds - 90) * 1000}-0")
    await loops.check_redis(store)
    assert 89 <= store.recent.oldest_s["posterior_updates"] < 150
    assert store.recent.oldest_s["leases"] == 0.0
    text = metrics.render(store).decode()
    assert 'value_store_stream_oldest_seconds{stream="posterior_updates"} ' in text
    [line] = [
        one for one in text.splitlines() if one.startswith("singlestream_value_store_sampling_effective_prompts ")
    ]
    assert abs(float(line.split()[1]) - 4.0) < 1e-9, "four prompts alike"
    await settle(store)
    await loops.check_redis(store)
    assert store.recent.oldest_s["posterior_updates"] == 0.0, "the last entry stays, but it has been applied"
