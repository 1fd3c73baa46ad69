"""The death of any one process loses nothing and stops nothing for good (I8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.e2e.conftest import Run
from tests.processes import gone

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

Running = Callable[[Callable[[Run], Awaitable[None]]], Awaitable[None]]


async def kill_the_value_store(run: Run) -> None:
    prompt_id = (await run.store.list(limit=1, order="visits", descending=True)).prompts[0].prompt_id
    before = await run.store.get(prompt_id)
    store = run.supervisor.children["value_store"]
    run.process("value_store").kill()
    await run.until(lambda: store.restarts, "the value store's restart")
    await store.wait_ready(print)
    assert (await run.store.get(prompt_id)).visits >= before.visits


async def kill_the_learner(run: Run) -> None:
    run.process("learner").kill()
    await run.until(lambda: run.supervisor.children["learner"].restarts, "the learner's restart")


async def kill_the_replica(run: Run) -> None:
    replica = run.process("rollout", "ray::ServeReplica")
    replica.kill()
    await run.until(lambda: gone(replica), "the replica's end")


async def test_each_is_killed_in_turn(running: Running) -> None:
    """Training goes on after each death, and in the end every lease has been trained once."""

    async def body(run: Run) -> None:
        for kill in (kill_the_value_store, kill_the_learner, kill_the_replica):
            steps = len(run.steps())
            await run.until(lambda at=steps + 2: len(run.steps()) >= at, f"two steps before {kill.__name__}")
            await kill(run)
        await run.finished_cleanly()
        visits = [prompt.visits async for prompt in run.store.iterate(limit=200)]
        assert sum(visits) == 12 * 32 + (await run.store.ledger()).train.stale

    await running(body)
