"""How training ends: stopped early, finished, and made longer afterwards."""

from __future__ import annotations

import math

import pytest
from redis.asyncio import Redis

from services.value_store import loops, metrics
from services.value_store.prompts import Refused
from services.value_store.store import Store
from singlestream.contracts import EndOfRun, Tombstone, decode
from singlestream.streams import Keys
from tests.services.value_store.test_store import start
from tests.services.value_store.world import (
    Running,
    World,
    evidence,
    make_config,
    make_prompts,
    make_trajectory,
    settle,
    until,
    wake,
)


async def test_early_stop(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    await store.issue(8)
    held = await world.take(3)
    assert await store.set_training("stopped") == "stopping"
    await store.wind_down()
    assert store.memory.state == "stopping"  # three leases are still with the replica
    await loops._wanted(store)
    assert store.training_waits_for() == "3 leases that replicas hold to end"
    store.replicas = []
    assert store.training_waits_for() == "3 leases that replicas hold to end, and no replica lives to end them"
    cancelled = [one for one in await world.read() if isinstance(one, Tombstone)]
    assert sorted(one.lease_id.split(":")[2] for one in cancelled) == list("45678")
    assert {one.reason for one in cancelled} == {"cancelled"}
    assert await store.issue(5) == 0
    await world.replica.hand_over(held[0], None, count_attempt=False)
    for one in held[1:]:
        await world.replica.emit(one, make_trajectory(one.lease, 1.0))
    await store.wind_down()
    assert store.memory.state == "stopped"
    assert store.training_waits_for() is None
    assert b"value_store_finished 0.0" in metrics.render(store), "two leases are with the learner"
    entries = [decode(fields[b"m"]) for _, fields in await redis.xrange(keys.trajectories)]
    assert isinstance(entries[-1], EndOfRun)
    assert len(entries) == 8 + 1
    await world.learner.send_updates([evidence(make_trajectory(one.lease, 1.0)) for one in held[1:]])
    await settle(store)
    assert b"value_store_finished 1.0" in metrics.render(store)
    counts = (await world.ledger())["train"]
    assert (counts.outstanding, counts.ended["cancelled"], counts.ended["trained"]) == (0, 6, 2)
    assert not store.memory.table.in_flight.any()
    with pytest.raises(Refused, match="cannot be taken back"):
        await store.set_training("running")
    assert await store.set_training("stopped") == "stopped"


async def test_the_log_says_what_an_early_stop_waits_for(
    redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    store, world = await start(redis, keys)
    await store.issue(2)
    await world.take()
    await store.set_training("stopped")
    async with Running(Store(store.config, redis)):  # it says so at its start, and then once a minute
        waits = "the early stop waits for 2 leases that replicas hold to end"
        await until(lambda: waits in caplog.text, "a line in the log")


async def test_a_finished_run_goes_on_when_it_is_made_longer(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, total_steps=1)
    await store.issue(8)
    await world.play()
    await world.train()
    await settle(store)
    assert store.memory.state == "finished"
    assert b"value_store_finished 1.0" in metrics.render(store)
    longer = Store(make_config(keys, total_steps=2), redis)
    await wake(longer)
    assert longer.memory.state == "paused"
    assert b"value_store_finished 0.0" in metrics.render(longer)
    await longer.set_training("running")
    assert await longer.issue(8) == 4


async def test_a_run_ends_by_itself(redis: Redis, keys: Keys) -> None:
    """With its loops: every trajectory of every step, no more, and then training is finished."""
    config = make_config(keys, total_steps=6)
    world = World(redis, keys)
    async with Running(Store(config, redis)) as store:
        await world.start()
        await store.upsert(make_prompts(12), [None] * 12)
        await store.set_training("running")
        await world.publish(0)
        kinds = iter(["trained", "stale", "trained", "trained"] * 1000)

        async def turn() -> bool:
            await world.report()
            await world.play(lambda lease: float(int(lease.answer) % 2))
            outstanding = (await world.ledger())["train"].outstanding
            assert outstanding <= 8
            await world.learner.send_updates([evidence(one, next(kinds)) for one in await world.read()])
            return store.memory.state == "finished"

        await until(turn, "the run to finish")
        counts = (await world.ledger())["train"]
        assert counts.ended["trained"] == 24
        assert counts.outstanding == 0
        assert counts.ended["stale"] >= 6
        assert store.memory.calibration.brier is not None
        assert math.isclose(store.memory.calibration.sums[:, 0].sum(), counts.leased)
