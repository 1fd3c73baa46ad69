"""The worker on a real Redis, with a scripted engine: leases are taken, run, graded, and ended once."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.rollout.graders import Response
from singlestream.contracts import (
    PosteriorUpdate,
    Tombstone,
    Trajectory,
    decode,
)
from singlestream.streams import GROUP, Keys
from tests.services.rollout.scripted import ScriptedEngine, lease
from tests.services.rollout.site import BOX, CALL, TOKENIZER, Site, Working, true, until


def raises(_: Response) -> float:
    raise RuntimeError("the user's grader is broken")


def not_a_number(_: Response) -> float:
    return math.nan


released: list[asyncio.Event] = []


async def waits(_: Response) -> float:
    await released[-1].wait()
    return 1.0


async def test_two_workers_end_every_lease_once(site: Site) -> None:
    leases = [lease(n) for n in range(1, 41)]
    await site.add(*leases)
    engine = ScriptedEngine(TOKENIZER, [CALL, BOX])
    engine.gate.clear()
    async with Working(site.worker("a", engine)) as a, Working(site.worker("b", engine)) as b:
        await until(lambda: true(bool(a.running and b.running)), "leases in the hands of both")
        engine.gate.set()
        ended = await site.until_ended(40)
        assert {*map(str, await site.redis.hkeys(site.keys.replicas))} == {"b'a'", "b'b'"}
        report = json.loads(await site.redis.hget(site.keys.replicas, "a"))
        assert set(report) == {"node", "slots", "in_use", "version", "lineage", "pinned", "paused", "at_s"}
    assert Counter(one.lease_id for one in ended) == Counter(one.lease_id for one in leases)  # type: ignore[attr-defined]
    assert all(isinstance(one, Trajectory) and one.reward == 1.0 and one.turns == 2 for one in ended)
    assert {s.replica for one in ended for s in one.segments[1:] if s.replica} == {"a", "b"}  # type: ignore[attr-defined]
    assert a.metrics.reward._sum.get() + b.metrics.reward._sum.get() == 40
    assert await site.redis.hlen(site.keys.live) == 0
    assert await site.redis.xlen(site.keys.leases("train")) == 0
    assert await site.redis.hlen(site.keys.replicas) == 0


async def test_never_more_leases_than_slots(site: Site) -> None:
    await site.add(*(lease(n) for n in range(1, 11)))
    await site.add(*(lease(lease_id=f"estimate:0000abcd:{n}") for n in range(1, 6)))
    engine = ScriptedEngine(TOKENIZER, [BOX], stall=(0, 3))
    async with Working(site.worker("a", engine, slots=3)) as worker:
        await until(lambda: true(len(worker.running) == 3), "three running episodes")
        await asyncio.sleep(1.2)
        assert len(worker.running) == 3
        pending = [await site.redis.xpending(site.keys.leases(p), GROUP) for p in ("train", "estimate", "evaluate")]
        assert sum(one["pending"] for one in pending) == 3


async def test_a_sampled_episode_leaves_its_slot_before_it_is_graded(site: Site) -> None:
    released.append(asyncio.Event())
    await site.add(*(lease(n, environment=f"tiny_tool/{__name__}:waits") for n in range(1, 5)))
    engine = ScriptedEngine(TOKENIZER, [BOX])
    async with Working(site.worker("a", engine, slots=1)) as worker:
        await until(lambda: true(len(engine.requests) == 2), "the second episode, while the first is graded")
        await until(lambda: true(worker.report()["in_use"] == 0), "the second one's last token")
        await asyncio.sleep(0.5)
        assert len(engine.requests) == len(worker.running) == 2  # and no third: graders are waited for in the end
        assert await site.ended() == []
        released[-1].set()
        await site.until_ended(4)


async def test_a_pause_holds_for_a_worker_that_starts_later(site: Site) -> None:
    await site.redis.set(site.keys.rollout_paused, 1)
    await site.add(lease(1))
    engine = ScriptedEngine(TOKENIZER, [BOX])
    async with Working(site.worker("a", engine)) as worker:
        await until(lambda: site.redis.hexists(site.keys.replicas, "a"), "the first report")  # no lease before it
        await asyncio.sleep(0.3)
        assert worker.report()["paused"]
        assert engine.requests == []
        await site.redis.delete(site.keys.rollout_paused)
        await site.until_ended(1)  # by itself: the next report finds it gone
        assert not worker.report()["paused"]


async def test_a_fault_of_the_sandbox_costs_an_attempt_and_its_end_is_named(site: Site) -> None:
    site.sandbox.faults = 3
    await site.add(lease(1))
    async with Working(site.worker("a", ScriptedEngine(TOKENIZER, [CALL, BOX]), max_attempts=3)):
        [ended] = await site.until_ended(1)
    assert isinstance(ended, Tombstone)
    assert (ended.reason, ended.attempts) == ("tool_unavailable", 3)
    assert "the gateway is away" in ended.detail
    assert await site.redis.xlen(site.keys.dead_letters) == 1
    [(_, fields)] = await site.redis.xrange(site.keys.posterior_updates)
    update = decode(fields[b"m"])
    assert isinstance(update, PosteriorUpdate)
    assert (update.lease_id, update.outcome) == ("train:0000abcd:1", "failed")


async def test_no_lease_is_taken_while_the_gateway_is_away(site: Site) -> None:
    site.sandbox.faults = 1
    site.tools_are_healthy = False
    await site.add(*(lease(n) for n in range(1, 4)))
    engine = ScriptedEngine(TOKENIZER, [CALL, BOX])
    async with Working(site.worker("a", engine, slots=1)) as worker:
        await until(lambda: true(worker.metrics.handed_over.labels("tool")._value.get() == 1), "the fault")
        await asyncio.sleep(1.5)
        assert await site.ended() == []
        assert len(engine.requests) == 1
        site.tools_are_healthy = True
        ended = await site.until_ended(3)
    assert Counter(one.attempts for one in ended) == {1: 2, 2: 1}  # type: ignore[attr-defined]


async def test_a_task_without_code_needs_no_gateway(site: Site) -> None:
    site.tools_are_healthy = False
    await site.add(lease(1, environment="tests.services.rollout.guessing:Guessing", attempts=1))
    async with Working(site.worker("a", ScriptedEngine(TOKENIZER, ["<guess>7</guess>"]))):
        [ended] = await site.until_ended(1)
    assert isinstance(ended, Trajectory)
    assert (ended.reward, ended.attempts) == (1.0, 2)


@pytest.mark.parametrize(
    ("environment", "reason", "detail"),
    [
        (f"tiny_tool/{__name__}:raises", "grader_error", "the user's grader is broken"),
        (f"tiny_tool/{__name__}:not_a_number", "grader_error", "a reward is finite"),
        ("no_such_environment", "malformed", "no_such_environment"),
        ("tiny_tool/no.such:grader", "malformed", "no.such:grader"),
    ],
)
async def test_a_lease_that_cannot_be_graded_fails_alone(
    site: Site, environment: str, reason: str, detail: str
) -> None:
    await site.add(lease(1, environment=environment), lease(2))
    async with Working(site.worker("a", ScriptedEngine(TOKENIZER, [BOX]))):
        ended = {one.lease_id: one for one in await site.until_ended(2)}  # type: ignore[attr-defined]
    broken, good = ended["train:0000abcd:1"], ended["train:0000abcd:2"]
    assert isinstance(broken, Tombstone)
    assert broken.reason == reason
    assert detail in broken.detail
    assert isinstance(good, Trajectory)


async def test_a_prompt_that_does_not_fit_is_malformed(site: Site) -> None:
    await site.add(lease(1, question="x" * 2000))
    async with Working(site.worker("a", ScriptedEngine(TOKENIZER, [BOX]))):
        [ended] = await site.until_ended(1)
    assert isinstance(ended, Tombstone)
    assert ended.reason == "malformed"


async def test_a_lease_waits_for_its_policy_version(site: Site) -> None:
    engine = ScriptedEngine(TOKENIZER, [BOX])
    await site.add(lease(1, version=3, lineage=1), lease(2, version=0, lineage=1))
    async with Working(site.worker("a", engine)):
        [ended] = await site.until_ended(1)
        assert ended.lease_id == "train:0000abcd:2"  # type: ignore[attr-defined]
        await asyncio.sleep(0.3)
        assert len(engine.requests) == 1
        await site.publish(3)
        await site.until_ended(2)
    assert engine.held == (3, 1)


async def test_a_version_that_never_comes_is_named(site: Site) -> None:
    await site.add(lease(1, version=3, lineage=1))
    worker = site.worker("a", ScriptedEngine(TOKENIZER, [BOX]), weights_timeout_s=0.3, max_attempts=2)
    async with Working(worker):
        [ended] = await site.until_ended(1)
    assert isinstance(ended, Tombstone)
    assert ended.reason == "attempts"


async def test_only_estimation_runs_before_the_first_published_policy(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    site = Site(redis, keys, tmp_path)
    await site.add(lease(1), lease(lease_id="estimate:0000abcd:1"))
    async with Working(site.worker("a", ScriptedEngine(TOKENIZER, [BOX]))) as worker:
        await site.until_ended(1, "estimate")
        assert "policy_versions" in str(worker.weights.waiting_for)
        assert await site.ended() == []
        await site.publish(0)
        await site.until_ended(1)
        assert worker.weights.waiting_for is None


async def test_versions_passed_over_are_counted_and_never_go_back(site: Site) -> None:
    engine = ScriptedEngine(TOKENIZER, [BOX])
    async with Working(site.worker("a", engine)) as worker:
        await worker.weights.ensure(0, 1)
        for version in (5, 4, 6):
            await site.publish(version)
        await worker.weights.ensure(6, 1)
        await site.publish(2)
        await site.add(lease(1, version=6, lineage=1))
        await site.until_ended(1)
    assert engine.held == (6, 1)


async def test_versions_passed_over_after_an_error_and_a_hold_are_counted_too(site: Site) -> None:
    keeper = site.worker("a", ScriptedEngine(TOKENIZER, [BOX])).weights
    stop = asyncio.Event()
    following = asyncio.create_task(keeper.run(stop))
    await keeper.ensure(0, 1)
    await site.publish(1, readable=False)
    await until(lambda: true(bool(keeper.last_error)), "an update that fails")
    await keeper.hold(True)
    for version in (2, 3):
        await site.publish(version)
    await keeper.hold(False)
    await keeper.ensure(3, 1)
    assert keeper.held == (3, 1)
    await until(lambda: true(keeper.metrics.skipped._value.get() == 2), "the count of versions 1 and 2")
    stop.set()
    await following
