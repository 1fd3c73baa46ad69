"""The death of any one process loses nothing and stops nothing for good (I8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.e2e.conftest import Run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

Running = Callable[[Callable[[Run], Awaitable[None]]], Awaitable[None]]


async def test_the_learner_is_killed(running: Running) -> None:
    async def body(run: Run) -> None:
        await run.until(lambda: len(run.steps()) >= 5, "five steps")
        run.process("learner").kill()
        await run.until(lambda: run.supervisor.children["learner"].restarts == 1, "the restart")
        await run.finished_cleanly()

    await running(body)


async def test_a_rollout_replica_is_killed(running: Running) -> None:
    async def body(run: Run) -> None:
        await run.until(lambda: len(run.steps()) >= 3, "three steps")
        replica = run.process("rollout", "ray::ServeReplica")
        replica.kill()
        await run.finished_cleanly()
        assert not replica.is_running()

    await running(body)


async def test_the_value_store_is_killed(running: Running) -> None:
    async def body(run: Run) -> None:
        prompt_id = (await run.store.list(limit=1, order="visits", descending=True)).prompts[0].prompt_id
        await run.until(lambda: len(run.steps()) >= 4, "four steps")
        before = await run.store.get(prompt_id)
        run.process("value_store").kill()
        await run.until(lambda: run.supervisor.children["value_store"].restarts == 1, "the restart")
        await run.supervisor.children["value_store"].wait_ready(print)
        after = await run.store.get(prompt_id)
        assert after.visits >= before.visits
        await run.finished_cleanly()
        visits = [prompt.visits async for prompt in run.store.iterate(limit=200)]
        assert sum(visits) == 12 * 32 + (await run.store.ledger()).train.stale

    await running(body)
