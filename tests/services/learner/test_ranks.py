"""Two ranks under one launcher: a stop and a death reach both."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable

import psutil
import pytest
from redis import Redis

from singlestream.streams import Keys
from tests.services.learner.recorded import Run, record
from tests.services.learner.waiting import end, resume_step, wait_until


def rank(number: int, launcher: subprocess.Popen[str]) -> psutil.Process:
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(number))


@pytest.mark.timeout(400)
def test_a_stop_of_one_rank_and_the_death_of_another_end_both(
    sync_redis: Redis, keys: Keys, make_run: Callable[..., Run]
) -> None:
    record(sync_redis, keys, 64, last=11)
    run = make_run(learner={"ranks": 2, "checkpoint_every": 100})
    process = run.start()
    wait_until(lambda: b"3 of 8 have arrived" in (sync_redis.get(keys.learner) or b""), process)
    rank(1, process).send_signal(signal.SIGTERM)
    output = end(process)
    assert process.returncode == 0, output
    assert output.count("stopping after step 1: a signal asked for it") == 2
    assert resume_step(sync_redis, keys) == 1, "a checkpoint was left"
    sync_redis.delete(keys.learner)

    process = run.start()
    wait_until(lambda: b"3 of 8 have arrived" in (sync_redis.get(keys.learner) or b""), process)
    children = psutil.Process(process.pid).children()
    rank(1, process).kill()
    output = end(process)
    assert process.returncode != 0
    assert "a rank ended with -9: stopping the others" in output
    assert "rank 0 of 2 cannot go on" in output, "the one that lives says why it ends"
    assert not any(child.is_running() for child in children)
