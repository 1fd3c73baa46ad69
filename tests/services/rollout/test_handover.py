"""Replicas that stop, drain, fall silent or lose Redis: every lease goes to another, once, with its tokens."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from services.rollout import worker as worker_module
from services.rollout.environments import make_environment
from services.rollout.generation import EngineDead, Generation, GenerationRequest
from services.rollout.node import MARK_S, handed_over
from singlestream.contracts import (
    Lease,
    Progress,
    Segment,
    Trajectory,
    decode,
    encode,
)
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import GROUP, Held, Keys, LeaseConsumer, connect
from tests.services.rollout.scripted import ScriptedEngine, lease
from tests.services.rollout.site import BOX, CALL, TOKENIZER, Site, Working, true, until
from tests.streams.refusal import unable_to_save


async def test_a_stopped_worker_hands_over_and_another_goes_on(site: Site) -> None:
    await site.add(*(lease(n) for n in range(1, 4)))
    engine = ScriptedEngine(TOKENIZER, [CALL, "it is " + BOX], stall=(1, 4))
    first = site.worker("a", engine)
    async with Working(first):
        await until(lambda: true(len(engine.requests) == 6), "three second turns")
    assert await site.redis.hlen(site.keys.live) == 3
    assert await site.ended() == []
    ran = len(site.sandbox.ran)
    async with Working(site.worker("b", ScriptedEngine(TOKENIZER, [CALL, "it is " + BOX]))):
        ended = await site.until_ended(3)
    for one in ended:
        assert isinstance(one, Trajectory)
        assert [s.replica for s in one.segments if s.kind == "generated"] == ["a", "a", "b"]
        assert [len(s.token_ids) for s in one.segments if s.kind == "generated"][1] == 4
        assert (one.reward, one.attempts, one.turns, len(one.tool_calls)) == (1.0, 1, 2, 1)
    assert len(site.sandbox.ran) == ran


async def test_a_draining_node_hands_over_and_takes_nothing_any_more(site: Site) -> None:
    await site.add(lease(1))
    engine = ScriptedEngine(TOKENIZER, [BOX], stall=(0, 4))
    worker = site.worker("a", engine)
    working = asyncio.create_task(worker.run())
    await engine.stalled.wait()
    assert await handed_over(site.redis, site.keys, worker.node, deadline_s=30.0)
    await asyncio.wait_for(working, 20)
    assert 0 < await site.redis.ttl(site.keys.draining) <= MARK_S
    # whoever is started there again, as by Serve, sees the mark before it takes a lease
    again = site.worker("a2", ScriptedEngine(TOKENIZER, [BOX]))
    again.node = worker.node
    await asyncio.wait_for(again.run(), 20)
    assert await site.ended() == []
    async with Working(site.worker("b", ScriptedEngine(TOKENIZER, [BOX]))):
        [ended] = await site.until_ended(1)
    assert isinstance(ended, Trajectory)
    first = ended.segments[1]
    assert (first.replica, len(first.token_ids)) == ("a", 4)
    assert {s.replica for s in ended.segments[1:]} == {"a", "b"}


async def test_a_replica_that_does_not_sign_off_is_not_waited_for_longer(site: Site) -> None:
    for name, unreadable in (("torn", "{"), ("strange", "[]"), ("timeless", '{"node": "n"}')):
        await site.redis.hset(site.keys.replicas, name, unreadable)
    report = {"node": "n", "at_s": time.time() + 60}
    await site.redis.hset(site.keys.replicas, "hung", json.dumps(report))
    assert not await handed_over(site.redis, site.keys, "n", deadline_s=0.5)
    await site.redis.hset(site.keys.replicas, "hung", json.dumps(report | {"at_s": time.time() - 60}))
    assert await handed_over(site.redis, site.keys, "n", deadline_s=30.0)


async def test_the_leases_of_a_silent_replica_are_taken_over(site: Site) -> None:
    await site.add(*(lease(n) for n in range(1, 6)))
    silent = LeaseConsumer(site.redis, site.keys, "silent")
    await silent.join()
    held = await silent.take(["train"], 5, 100)
    assert len(held) == 5
    async with Working(site.worker("a", ScriptedEngine(TOKENIZER, [BOX]), lease_timeout_s=1.0)):
        ended = await site.until_ended(5)
        # the silent one wakes up: nothing that it does changes anything
        trajectory = next(one for one in ended if one.lease_id == held[0].lease.lease_id)  # type: ignore[attr-defined]
        assert sorted(await silent.heartbeat(held)) == sorted(one.lease.lease_id for one in held)
        assert isinstance(trajectory, Trajectory)
        assert not await silent.emit(held[0], trajectory)
        assert not await silent.hand_over(held[0], None, count_attempt=False)
        assert not await silent.fail(held[0], "cancelled", "late")
    assert await site.redis.xlen(site.keys.trajectories) == 5
    attempts = {one.attempts for one in ended}  # type: ignore[attr-defined]
    assert min(attempts) == 2  # a machine that stands still for the short time-out may cost one more


async def test_no_lease_is_claimed_just_after_redis_was_away(site: Site) -> None:
    """Its holder could not keep it alive either: a long outage would cost every episode of the run an attempt.

    The same when the machine stood still.
    """
    await site.add(lease(1))
    holder = LeaseConsumer(site.redis, site.keys, "holder")
    await holder.join()
    [held] = await holder.take(["train"], 1, 100)
    long_ago_ms = 7_200_000
    await site.redis.xclaim(site.keys.leases("train"), GROUP, "holder", 0, [held.entry], idle=long_ago_ms, justid=True)
    worker = site.worker("a", ScriptedEngine(TOKENIZER, [BOX]), lease_timeout_s=3600.0)

    async def away() -> None:
        worker._over.set()  # after this round
        raise ConnectionError("away")

    async def nothing_is_claimed() -> None:
        await worker._claim()
        assert await holder.heartbeat([held]) == []
        await site.redis.xclaim(
            site.keys.leases("train"), GROUP, "holder", 0, [held.entry], idle=long_ago_ms, justid=True
        )

    await worker._every(60.0, "report", away)
    await nothing_is_claimed()
    worker._silent_at_s -= 1800.0
    worker._beat_at_s -= 1801.0  # this process stood still, and so may have the holder
    await nothing_is_claimed()
    await worker._heartbeat()
    await nothing_is_claimed()
    worker._silent_at_s -= 1800.0
    await worker._claim()
    assert await holder.heartbeat([held]) == [held.lease.lease_id]


async def test_an_episode_whose_lease_was_taken_away_is_cancelled(site: Site) -> None:
    await site.add(lease(1))
    engine = ScriptedEngine(TOKENIZER, [BOX], stall=(0, 2))
    async with Working(site.worker("a", engine, lease_timeout_s=3600.0)) as worker:
        await engine.stalled.wait()
        entry = (await site.redis.hget(site.keys.live, "train:0000abcd:1")).decode()
        await site.redis.xclaim(site.keys.leases("train"), GROUP, "thief", 0, [entry])
        await worker._heartbeat()
        await until(lambda: true(not worker.running), "the cancelled episode")
        assert worker.metrics.lost._value.get() == 1
    assert await site.redis.hlen(site.keys.live) == 1
    assert await site.ended() == []


class DyingEngine(ScriptedEngine):
    """Dies in the second turn."""

    async def generate(self, request_id: str, request: GenerationRequest) -> Generation:
        if self.requests:
            raise EngineDead("the engine died")
        return await super().generate(request_id, request)


async def test_a_dead_engine_ends_the_worker_and_gives_the_lease_back(site: Site) -> None:
    await site.add(lease(1))
    worker = site.worker("a", DyingEngine(TOKENIZER, [CALL, BOX]))
    with pytest.raises(EngineDead):
        await asyncio.wait_for(worker.run(), 20)
    [(_, fields)] = await site.redis.xrange(site.keys.leases("train"))
    back = decode(fields[b"m"])
    assert isinstance(back, Lease)
    assert back.attempts == 1
    assert back.progress is not None
    assert [s.kind for s in back.progress.segments] == ["prompt", "generated", "observation"]
    async with Working(site.worker("b", ScriptedEngine(TOKENIZER, [CALL, BOX]))):
        [ended] = await site.until_ended(1)
    assert isinstance(ended, Trajectory)
    assert ended.attempts == 2


async def test_an_engine_that_dies_while_redis_is_away_is_told_all_the_same(site: Site) -> None:
    await site.add(lease(1))
    worker = site.worker("a", DyingEngine(TOKENIZER, [CALL, BOX]), stop_timeout_s=0.5)

    async def away(*_: Any, **__: Any) -> bool:
        raise ConnectionError("away")

    worker.consumer.hand_over = away  # type: ignore[method-assign]
    with pytest.raises(EngineDead):
        await asyncio.wait_for(worker.run(), 60)


async def test_waiting_for_a_replica_is_no_part_of_an_episodes_time(site: Site) -> None:
    """So an outage longer than an episode may take ends none: it would be graded as it stands, as the model's doing."""
    ran_s, waited_s = 100.0, 3600.0
    back_s = time.time() - waited_s
    prompt = make_environment("tiny_tool", TOKENIZER).reset("3+4=?")
    sampled = Segment(
        kind="generated", token_ids=TOKENIZER.encode(BOX)[:4], logprobs=[-0.5] * 4, version=0, lineage=1, replica="a"
    )
    progress = Progress(
        segments=[Segment(kind="prompt", token_ids=prompt), sampled],
        turns=0,
        tool_calls=[],
        started_at_s=back_s - ran_s,
    )
    for number in (1, 2):
        one = lease(number, progress=progress)
        entry = f"{int(back_s * 1000)}-{number}"
        await site.redis.xadd(site.keys.leases("train"), {"id": one.lease_id, "m": encode(one)}, entry)
        await site.redis.hset(site.keys.live, one.lease_id, entry)
    silent = LeaseConsumer(site.redis, site.keys, "silent")
    await silent.join()
    assert len(await silent.take(["train"], 1, 100)) == 1  # and never goes on with it
    worker = site.worker("b", ScriptedEngine(TOKENIZER, [BOX]), lease_timeout_s=1.0, max_attempts=50)
    async with Working(worker):
        ended = await site.until_ended(2)
    for outcome in ended:
        assert isinstance(outcome, Trajectory)
        assert (outcome.end_reason, outcome.reward) == ("stop", 1.0)
        assert ran_s - 1 < outcome.finished_at_s - outcome.started_at_s < worker.settings.episode_deadline_s


async def test_a_replica_that_hands_over_slowly_still_reports(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node would end it otherwise: `node.SILENT_S`."""
    monkeypatch.setattr(worker_module, "REPORT_S", 0.02)
    await site.add(lease(1))
    engine = ScriptedEngine(TOKENIZER, [BOX], stall=(0, 2))
    engine.gate.clear()
    worker = site.worker("a", engine)
    working = asyncio.create_task(worker.run())
    await until(lambda: true(bool(worker.running)), "the episode")
    worker.stop()
    await site.redis.hdel(site.keys.replicas, "a")
    await until(lambda: site.redis.hexists(site.keys.replicas, "a"), "a report while it hands over")
    assert worker.running
    engine.gate.set()
    await asyncio.wait_for(working, 20)
    assert await site.redis.hlen(site.keys.replicas) == 0
    assert await site.redis.xlen(site.keys.leases("train")) == 1


async def test_what_a_late_take_brings_is_put_back(site: Site) -> None:
    """The stop comes while the reply to the last take is still under way."""
    await site.add(lease(1))
    worker = site.worker("a", ScriptedEngine(TOKENIZER, [BOX]))
    take, asked, released = worker.consumer.take, asyncio.Event(), asyncio.Event()

    async def late(*arguments: Any) -> list[Held]:
        held = await take(*arguments)
        if held:
            asked.set()
            await released.wait()
        return held

    worker.consumer.take = late  # type: ignore[method-assign]
    working = asyncio.create_task(worker.run())
    await asked.wait()
    worker.stop()
    await asyncio.sleep(1.5)  # longer than a take waits for leases
    released.set()
    await asyncio.wait_for(working, 20)
    [(_, fields)] = await site.redis.xrange(site.keys.leases("train"))
    back = decode(fields[b"m"])
    assert isinstance(back, Lease)
    assert back.attempts == 0
    assert (await site.redis.xpending(site.keys.leases("train"), GROUP))["pending"] == 0


async def test_a_redis_that_refuses_writes_is_waited_for(keys: Keys, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        server = EmbeddedRedis(Path(folder), fsync="no")
        server.start()
        async with connect(server.url) as redis, connect(server.url) as working:
            site = Site(redis, keys, tmp_path)
            await site.publish(0)
            engine = ScriptedEngine(TOKENIZER, [BOX])
            engine.gate.clear()
            await site.add(*(lease(n) for n in range(1, 4)))
            async with Working(site.worker("a", engine, working, slots=2)) as worker:
                await until(lambda: true(len(worker.running) == 2), "two episodes")
                async with unable_to_save(server, redis):
                    engine.gate.set()
                    for what in ("report", "take", "write"):
                        refused = worker.metrics.redis_retries.labels(what)._value
                        await until(lambda: true(refused.get() > 0), f"a refused {what}")  # noqa: B023
                    assert await site.ended() == []
                await site.until_ended(3)
            assert await redis.hlen(keys.live) == 0
        server.stop()


async def test_redis_goes_away_and_comes_back(keys: Keys, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        server = EmbeddedRedis(Path(folder))
        server.start()
        redis, working = connect(server.url), connect(server.url)
        site = Site(redis, keys, tmp_path)
        await site.publish(0)
        await site.add(*(lease(n) for n in range(1, 4)))
        engine = ScriptedEngine(TOKENIZER, [CALL, BOX], stall=(1, 2))
        async with Working(site.worker("a", engine, working, slots=2)) as worker:
            await until(lambda: true(len(engine.requests) >= 4), "two second turns")
            server.kill()
            await asyncio.sleep(0.5)
            server.start()
            engine.stall = None
            for event in engine._aborts.values():
                event.set()
            await until(lambda: site._count("train", 3), "three leases to end")
            assert worker.metrics.redis_retries.collect()[0].samples
        assert await redis.hlen(keys.live) == 0
        await redis.aclose()
        await working.aclose()
        server.stop()
