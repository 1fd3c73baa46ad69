"""Two ranks under one launcher: a stop and a death reach both."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest
from redis import Redis

from singlestream.streams import Keys
from tests.services.learner.recorded import Run, record

BOUND_S = 60.0


def wait_for(redis: Redis, keys: Keys, text: bytes, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + BOUND_S
    while text not in (redis.get(keys.learner) or b""):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"the learner never said {text!r}"
        time.sleep(0.05)


def rank(number: int, launcher: subprocess.Popen[str]) -> psutil.Process:
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(number))


@pytest.mark.timeout(240)
def test_a_stop_of_one_rank_and_the_death_of_another_end_both(
    sync_redis: Redis, keys: Keys, make_run: Callable[..., Run]
) -> None:
    record(sync_redis, keys, 64, last=11)
    run = make_run(learner={"ranks": 2, "checkpoint_every": 100})
    process = run.start()
    wait_for(sync_redis, keys, b"3 of 8 have arrived", process)
    rank(1, process).send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=BOUND_S)
    assert process.returncode == 0, output
    assert output.count("stopping after step 1: a signal asked for it") == 2
    assert (sync_redis.get(keys.resume) or b"").startswith(b"step-00000001-"), "a checkpoint was left"
    sync_redis.delete(keys.learner)

    process = run.start()
    wait_for(sync_redis, keys, b"3 of 8 have arrived", process)
    children = psutil.Process(process.pid).children()
    rank(1, process).kill()
    output, _ = process.communicate(timeout=BOUND_S)
    assert process.returncode != 0
    assert "a rank ended with -9: stopping the others" in output
    assert "rank 0 of 2 cannot go on" in output, "the one that lives says why it ends"
    assert not any(child.is_running() for child in children)
