"""Graders that users write: what hangs or is slow fails alone, and takes neither threads nor weights from the rest."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from services.rollout.grader_threads import GradersHang, GraderThreads, shared_threads
from services.rollout.graders import Response, apply_grader, load_grader
from services.rollout.math_pool import shared_pool
from singlestream.contracts import Tombstone
from singlestream.errors import DeadlineExceeded
from tests.ports import free_port
from tests.services.rollout.scripted import ScriptedEngine, lease
from tests.services.rollout.service import ROOT
from tests.services.rollout.site import BOX, TOKENIZER, Site, true, until

LONG_S = 60.0
released = threading.Event()


def hangs(_: Response) -> float:
    released.wait(LONG_S)
    return 1.0


async def never_ends(_: Response) -> float:
    await asyncio.sleep(LONG_S)
    return 1.0


def ends_the_process(_: Response) -> float:
    raise SystemExit(3)


@pytest.fixture(autouse=True)
def release() -> Iterator[None]:
    released.clear()
    yield
    released.set()


RESPONSE = Response("?", "7", BOX, BOX)


async def test_calls_that_hang_hold_up_no_other_until_they_are_too_many() -> None:
    threads = GraderThreads(calls=1, timeout_s=0.1, most_hung=2)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match=f"for the grader {__name__}:hangs"):
            await threads.call(hangs, RESPONSE)
    assert threads.hung == 2
    threads.timeout_s = LONG_S
    assert await threads.call(lambda: 7) == 7
    threads.timeout_s = 0.1
    with pytest.raises(GradersHang, match="3 calls of graders hang"):
        await threads.call(hangs, RESPONSE)
    released.set()
    await until(lambda: true(threads.hung == 0), "the calls to come back")


async def test_waiting_for_a_thread_is_no_part_of_a_calls_time() -> None:
    threads = GraderThreads(calls=1, timeout_s=0.1)
    await threads._free.acquire()
    waiting = asyncio.create_task(threads.call(lambda: 7))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    threads.timeout_s = LONG_S
    threads._free.release()
    assert await waiting == 7


async def test_a_grader_that_ends_its_thread_or_never_answers_fails_alone() -> None:
    with pytest.raises(RuntimeError, match=r"ends_the_process raised SystemExit\(3\)"):
        await apply_grader(ends_the_process, RESPONSE)
    shared_threads().timeout_s = 0.1
    with pytest.raises(DeadlineExceeded, match="never_ends"):
        await apply_grader(never_ends, RESPONSE)


async def test_a_comparison_waits_for_its_process_as_long_as_it_takes() -> None:
    """Its deadline begins with the comparison: where many are hard, the last is not failed for the others' time."""
    pool = shared_pool()
    shared_threads().timeout_s = 0.1
    idle = [pool._idle.get_nowait() for _ in range(pool._idle.qsize())]
    response = Response("?", "\\frac12", "", "so \\boxed{0.5}")
    waiting = asyncio.create_task(apply_grader(load_grader("math_verify"), response))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    for process in idle:
        pool._idle.put_nowait(process)
    assert await waiting == 1.0
    await pool.close()


async def test_too_many_that_hang_end_the_replica_by_name(site: Site) -> None:
    shared_threads().timeout_s, shared_threads().most_hung = 0.1, 0
    await site.add(lease(1, environment=f"tiny_tool/{__name__}:hangs"))
    worker = site.worker("a", ScriptedEngine(TOKENIZER, [BOX]))
    with pytest.raises(GradersHang, match=f"{__name__}:hangs"):
        await asyncio.wait_for(worker.run(), 60)
    [ended] = await site.ended()
    assert isinstance(ended, Tombstone)
    assert (ended.reason, ended.attempts) == ("grader_error", 1)
    assert await site.redis.xlen(site.keys.leases("train")) == 0


HUNG_START = """
import asyncio, time
from services.rollout import single
from singlestream.config import Config
from singlestream.errors import DeadlineExceeded

class Replica:
    def __init__(self, config):
        pass

    async def start(self):
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)
        raise DeadlineExceeded("the engine to start", 0.0)

    async def stop(self):
        pass

single.Replica = Replica
single.run_single(Config(run={"name": "r", "model": "none", "total_steps": 1}, rollout={"port": PORT}))
"""


def test_a_process_ends_though_a_thread_of_it_hangs() -> None:
    script = HUNG_START.replace("PORT", str(free_port()))
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1, ended.stderr
