"""kill -9 at random moments, ten times in one run, on one and two ranks: the run that comes out was never disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest
from redis import Redis

from singlestream.streams import Keys
from tests.services.learner.recorded import Run, lease, record
from tests.services.learner.test_learner_process import fingerprint, updates
from tests.services.learner.waiting import end, wait_until

KILLS = 10
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


@pytest.mark.e2e
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills(sync_redis: Redis, keys: Keys, make_run: Callable[..., Run], ranks: int) -> None:
    learner = {"ranks": ranks, "checkpoint_every": 3}
    undisturbed = make_run("u", run={"total_steps": STEPS}, learner=learner)
    record(sync_redis, Keys(undisturbed.name), BATCH * STEPS)
    undisturbed.finish()

    run = make_run(run={"total_steps": STEPS}, learner=learner)
    chance = random.Random(ranks)
    arrived = 0
    for number in range(1, KILLS + 1):
        # some more than two further batches: no start can reach the end of the run, and each can get further than those
        # before it, to be killed while it computes, publishes, writes a checkpoint or waits
        more = BATCH * 2 * number + chance.randrange(BATCH)
        record(sync_redis, keys, BATCH * STEPS, first=arrived + 1, last=more)
        arrived, seen = more, len(run.steps())
        process = run.start()
        wait_until(lambda seen=seen: len(run.steps()) > seen, process)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.3))
        kill(process, chance)
        assert process.returncode != 0, "it was killed before its end"
    record(sync_redis, keys, BATCH * STEPS, first=arrived + 1)
    run.finish()

    assert fingerprint(run) == fingerprint(undisturbed)
    assert trained(run) == trained(undisturbed), "the same leases at every step"
    leases = {lease(n) for n in range(1, BATCH * STEPS + 1)}
    assert Counter(number for _, number in trained(run)) == dict.fromkeys(leases, 1)
    assert len({s["lineage"] for s in run.steps()}) > 2, "several starts are in the lineage that survived"
    sent = updates(sync_redis, keys)
    assert {u.lease_id for u in sent} == leases
    assert {u.outcome for u in sent} == {"trained"}
    assert len({(u.lease_id, u.reward, u.version) for u in sent}) == BATCH * STEPS, "a repeated update says the same"
