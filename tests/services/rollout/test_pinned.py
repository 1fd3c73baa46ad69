"""A pinned evaluation on a real Redis and a real value store: one policy samples it, training goes on beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.rollout.worker import RolloutWorker
from services.value_store import evaluations
from services.value_store.jobs import Job
from services.value_store.store import Store
from singlestream.config import Config
from singlestream.contracts import Sampling, Tombstone, Trajectory
from singlestream.errors import Fenced
from singlestream.streams import Keys
from singlestream.streams.pins import Pin
from tests.services.rollout.scripted import ScriptedEngine, lease
from tests.services.rollout.site import BOX, TOKENIZER, Site, Working, true, until
from tests.services.value_store.world import Running, World, make_prompts

SAMPLING = Sampling(temperature=0.6, top_p=0.95, top_k=20)
JOB = "0123456789ab"


class SlowEngine(ScriptedEngine):
    """Takes as long for a turn as it is told, and samples with the version that it holds."""

    pause_s = 0.05

    async def generate(self, request_id, request):  # type: ignore[no-untyped-def]
        held = self.held
        self.versions = lambda _: held
        await asyncio.sleep(self.pause_s)
        return await super().generate(request_id, request)


@pytest.fixture
async def site(redis: Redis, keys: Keys, tmp_path: Path) -> AsyncIterator[tuple[Site, Store]]:
    one = Site(redis, keys, tmp_path)
    config = Config(
        run={"name": keys.run, "model": "none", "total_steps": 100_000, "train_batch_size": 4, "max_staleness": 9},
        value_store={"training": "running"},
    )
    store, learner = Store(config, redis), World(redis, keys)
    async with Running(store):
        await one.publish(0)
        await learner.learner.take_over()
        training = asyncio.create_task(train(learner))
        await store.upsert([*make_prompts(200), *make_prompts(30, "eval", "e")], [None] * 230)
        yield one, store
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)


async def train(learner: World) -> None:
    """Count what arrives as trained, so that admission goes on."""
    while True:
        try:
            await learner.train()
        except Fenced:
            await learner.learner.take_over()  # `Site.publish` is a learner too
        await asyncio.sleep(0.05)


def evaluation(store: Store, n: int = 2, number: str = JOB) -> Job:
    table = store.memory.table
    ids = [table.id(row) for row in range(len(table)) if table.split[row] == 1]
    return Job(number, "evaluate", ids, n, SAMPLING, 1.0, pinned=True)


def versions(job: Job) -> dict[str, int]:
    return job.summary()["versions"]  # type: ignore[no-any-return]


async def trained(site: Site, version: int) -> bool:
    entries = await site.ended()
    return any(s.version == version for one in entries for s in getattr(one, "segments", []))


async def test_one_policy_samples_it_while_the_other_replica_trains_on(site: tuple[Site, Store]) -> None:
    one, store = site
    first, second = SlowEngine(TOKENIZER, [BOX]), SlowEngine(TOKENIZER, [BOX])
    async with Working(one.worker("a", first)) as a, Working(one.worker("b", second)) as b:
        await until(lambda: true(len(store.alive_replicas()) == 2), "both replicas' reports")
        job = await evaluations.create_job(store, evaluation(store, n=8), resume=False)
        await until(lambda: true(job.policy == (0, 1) and job.done > 0), "the version of the evaluation")
        pinned, other = (a, b) if a.weights.holding else (b, a)
        await until(lambda: true(purposes(pinned) == {"evaluate"}), "the evaluation alone")
        engine = first if pinned is a else second
        engine.gate.clear()
        await one.publish(5)
        await until(lambda: true(other.weights.held == (5, 1)), "the other replica's update")
        await until(lambda: trained(one, 5), "training by the newer policy")
        await until(lambda: true(purposes(other) == {"train"}), "training alone")
        assert job.finished_at_s is None
        assert pinned.weights.held == (0, 1)
        assert purposes(pinned) == {"evaluate"}
        engine.gate.set()
        await until(lambda: true(job.finished_at_s is not None), "the evaluation", 60)
        assert versions(job) == {"0": job.total}
        assert job.failed == 0
        await until(lambda: true(pinned.weights.held == (5, 1)), "the update that was put off")
        await until(lambda: true(store.memory.pin is None), "the pin's end")
    assert await one.redis.xlen(one.keys.dead_letters) == 0


def purposes(worker: RolloutWorker) -> set[str]:
    return {running.held.lease.purpose for running in worker.running.values()}


async def test_a_version_that_died_with_its_replica_ends_the_job_by_name(site: tuple[Site, Store]) -> None:
    one, store = site
    async with Working(one.worker("a", SlowEngine(TOKENIZER, [BOX]))):
        await until(lambda: true(bool(store.alive_replicas())), "the replica's report")
        job = await evaluations.create_job(store, evaluation(store, n=8), resume=False)
        await until(lambda: true(job.done > 0), "the first results")
    await one.publish(5)
    async with Working(one.worker("b", SlowEngine(TOKENIZER, [BOX]))) as b:
        await until(lambda: true(job.error is not None), "the job's end")
        assert job.error == "policy version 0.1 is on no replica any more, they hold 5.1"
        after = await evaluations.create_job(store, evaluation(store, 1, "f" * 12), resume=True)
        await until(lambda: true(after.finished_at_s is not None), "the next evaluation", 60)
        assert versions(after) == {"5": after.total}
        await until(lambda: true(not store.memory.open["evaluate"]), "the old job's last leases to end")
        await until(lambda: true(not b.weights.holding), "the end of the hold")
        await until(lambda: true(store.memory.pin is None), "the pin's end")


async def test_a_pinned_lease_whose_job_is_gone_is_cancelled(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    one = Site(redis, keys, tmp_path)
    await one.publish(0)
    await one.add(lease(lease_id="evaluate:0000abcd:1", pinned=True, job=JOB, version=0, lineage=1))
    async with Working(one.worker("a", SlowEngine(TOKENIZER, [BOX]))):
        [ended] = await one.until_ended(1, "evaluate")
    assert isinstance(ended, Tombstone)
    assert (ended.reason, ended.detail) == ("cancelled", f"job {JOB} is no longer under way")


async def test_weights_are_held_only_once_a_published_policy_is_loaded(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    one = Site(redis, keys, tmp_path)
    await one.publish(3)
    hidden = tmp_path / "hidden"
    [file] = await asyncio.to_thread(lambda: list(tmp_path.glob("v3*")))
    file.rename(hidden)
    await redis.set(keys.pin, Pin(JOB, ("a",)).text())
    async with Working(one.worker("a", SlowEngine(TOKENIZER, [BOX]))) as a:
        await until(lambda: true(bool(a.weights.last_error) and a.weights.holding), "a load that failed")
        assert a.report()["pinned"] is None
        hidden.rename(file)
        await until(lambda: true(a.report()["pinned"] == JOB), "the answer")
        assert a.weights.held == (3, 1)


async def test_after_a_pin_an_unpinned_lease_waits_for_its_own_policy(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    one = Site(redis, keys, tmp_path)
    await one.publish(0)
    await redis.set(keys.pin, Pin(JOB, ("a",), 0, 1).text())
    async with Working(one.worker("a", SlowEngine(TOKENIZER, [BOX]))) as a:
        await until(lambda: true(a.report()["pinned"] == JOB), "the held weights")
        await one.publish(5)
        await redis.set(keys.pin, "")
        await one.add(lease(lease_id="evaluate:0000abcd:1", job="f" * 12, version=5, lineage=1))
        [ended] = await one.until_ended(1, "evaluate")
    assert isinstance(ended, Trajectory)
    assert ended.last_version == 5


async def test_resumed_and_cancelled(site: tuple[Site, Store]) -> None:
    _, store = site
    job = await evaluations.create_job(store, evaluation(store), resume=True)
    assert await evaluations.create_job(store, evaluation(store, number="f" * 12), resume=True) is job
    assert "none has reported" in str(evaluations.waiting_for(store, job))
    await store._read_anew()
    job = await evaluations.cancel_job(store, JOB)
    assert (job.error, evaluations.waiting_for(store, job)) == ("cancelled by request", None)
    assert await evaluations.create_job(store, evaluation(store, number="f" * 12), resume=True) is not job
    await store._read_anew()
    assert store.memory.jobs[JOB].error == "cancelled by request"
