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

from singlestream.contracts import PosteriorUpdate, decode_as
from singlestream.streams import Keys
from tests.services.learner.recorded import Run, lease, record

KILLS = 10
STEPS = 24


def kill(process: subprocess.Popen[str], chance: random.Random) -> None:
    """Kill everything, or one rank of several: the launcher then ends the others."""
    ranks = psutil.Process(process.pid).children()
    if ranks and chance.random() < 0.5:
        chance.choice(ranks).send_signal(signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills(sync_redis: Redis, keys: Keys, make_run: Callable[..., Run], ranks: int) -> None:
    learner = {"ranks": ranks, "checkpoint_every": 3}
    undisturbed = make_run("u", run={"total_steps": STEPS}, learner=learner)
    record(sync_redis, Keys(undisturbed.name), 8 * STEPS)
    undisturbed.finish()

    run = make_run(run={"total_steps": STEPS}, learner=learner)
    record(sync_redis, keys, 8 * STEPS)
    chance = random.Random(ranks)
    for _ in range(KILLS):
        seen = len(run.steps())
        process = run.start()
        deadline = time.monotonic() + 60
        while len(run.steps()) <= seen and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # until it gets further than before, so that the run ends at all
        if process.poll() is None:
            time.sleep(chance.uniform(0, 0.3))
            kill(process, chance)
    run.finish()

    assert [(s["step"], s["weights_crc32"], s["loss"]) for s in run.steps()] == [
        (s["step"], s["weights_crc32"], s["loss"]) for s in undisturbed.steps()
    ]
    assert len({s["lineage"] for s in run.steps()}) > 3, "the run was indeed interrupted"
    updates = [decode_as(PosteriorUpdate, f[b"m"]) for _, f in sync_redis.xrange(keys.posterior_updates)]
    assert Counter(u.lease_id for u in updates).keys() == {lease(n) for n in range(1, 8 * STEPS + 1)}
    assert {u.outcome for u in updates} == {"trained"}
    assert len({(u.lease_id, u.reward, u.version) for u in updates}) == 8 * STEPS, "a repeated update says the same"
