"""kill -9 at random moments, ten times in one run, on one and two ranks: the run that comes out was never disturbed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from services.value_store.memory import OpenLease
from services.value_store.store import Store
from services.value_store.table import new_record
from singlestream.streams import Keys
from singlestream.streams.ledger import read_ledger
from tests.services.learner.recorded import Run, lease, prompt, record
from tests.services.learner.test_learner_process import fingerprint, updates
from tests.services.learner.waiting import end, wait_until
from tests.services.value_store.world import make_config, settle, wake

KILLS = 10
EARLY = (3, 6, 9)
"""Kills that wait for no step: they meet the start itself, from its imports to the steps that it takes again."""
STEPS, BATCH = 24, 8


def trained(run: Run) -> list[tuple[int, str]]:
    """(step, lease) of every trajectory trained in the surviving lineage."""
    return [(one["step"], one["lease_id"]) for one in run.steps("evidence")]


def kill(process: subprocess.Popen[str], chance: random.Random) -> None:
    """Kill everything, or one rank of several: the launcher then ends the others."""
    ranks = psutil.Process(process.pid).children()
    if ranks and chance.random() < 0.5:
        chance.choice(ranks).send_signal(signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    end(process)


def seconds_to_the_first_step(run: Run) -> float:
    """Run to the end, undisturbed."""
    started = time.monotonic()
    process = run.start()
    wait_until(run.steps, process)
    took_s = time.monotonic() - started
    output = end(process)
    assert process.returncode == 0, output
    return took_s


async def apply_updates(url: str, keys: Keys, leases: int) -> tuple[list[int], int, int]:
    """Have a value store that issued these leases take the stream.

    Returns the visits of each prompt, the leases that are trained in the ledger, and the updates that it passed over.
    """
    async with Redis.from_url(url) as redis:
        numbers = range(1, leases + 1)
        open_leases = {lease(n): OpenLease(prompt(n), 0.5, 0, 0.0).pack() for n in numbers}
        await redis.hset(keys.values, mapping={prompt(n): new_record(0.5, 0.5, "train", "s", 0.0) for n in numbers})
        await redis.hset(keys.outstanding("train"), mapping=open_leases)
        await redis.hset(keys.ledger, "train:leased", leases)
        store = Store(make_config(keys, url), redis)
        await wake(store)
        await settle(store)
        counts = (await read_ledger(redis, keys))["train"]
        assert counts.adds_up and not counts.outstanding
        return store.memory.table.visits[:].tolist(), counts.ended["trained"], store.memory.duplicates


@pytest.mark.e2e
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills(sync_redis: SyncRedis, keys: Keys, make_run: Callable[..., Run], ranks: int) -> None:
    learner = {"ranks": ranks, "checkpoint_every": 3}
    undisturbed = make_run("u", run={"total_steps": STEPS}, learner=learner)
    record(sync_redis, Keys(undisturbed.name), BATCH * STEPS)
    start_s = seconds_to_the_first_step(undisturbed)

    run = make_run(run={"total_steps": STEPS}, learner=learner)
    chance = random.Random(ranks)
    arrived = furthest = 0
    for number in range(1, KILLS + 1):
        # some more than two further batches: no start can reach the end of the run, and each can get further than those
        # before it, to be killed while it computes, publishes, writes a checkpoint or waits
        more = BATCH * 2 * number + chance.randrange(BATCH)
        record(sync_redis, keys, BATCH * STEPS, first=arrived + 1, last=more)
        arrived = more
        process = run.start()
        if number in EARLY:
            time.sleep(chance.uniform(0, 1.5 * start_s))
        else:
            wait_until(lambda seen=furthest: len(run.steps()) > seen, process)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.3))
        kill(process, chance)
        furthest = max(furthest, len(run.steps()))
        assert process.returncode != 0, "it was killed before its end"
    record(sync_redis, keys, BATCH * STEPS, first=arrived + 1)
    run.finish()

    assert fingerprint(run) == fingerprint(undisturbed)
    assert trained(run) == trained(undisturbed), "the same leases at every step"
    leases = {lease(n) for n in range(1, BATCH * STEPS + 1)}
    assert Counter(number for _, number in trained(run)) == dict.fromkeys(leases, 1)
    # seven starts got further than any before: one of them left a checkpoint, and the last one took the last batches
    assert len({s["lineage"] for s in run.steps()}) >= 2, "several starts are in the lineage that survived"
    sent = updates(sync_redis, keys)
    assert {u.lease_id for u in sent} == leases
    assert {u.outcome for u in sent} == {"trained"}
    assert len({(u.lease_id, u.reward, u.version) for u in sent}) == BATCH * STEPS, "a repeated update says the same"
    visits, closed, repeats = asyncio.run(apply_updates(run.redis_url, keys, len(leases)))
    assert visits == [1] * len(leases), "each counts once in its prompt's posterior"
    assert (closed, repeats) == (len(leases), len(sent) - len(leases))
