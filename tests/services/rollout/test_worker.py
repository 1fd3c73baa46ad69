"""The worker on a real Redis, with a scripted engine: leases are taken, run, ended once, handed over and failed."""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from services.rollout.environments import make_environment
from services.rollout.generation import EngineDead, Generation, GenerationRequest
from services.rollout.graders import Response
from services.rollout.lease_run import LeaseRunner
from services.rollout.manifest import ModelTensors
from services.rollout.metrics import Metrics
from services.rollout.node import MARK_S, handed_over
from services.rollout.tools import SandboxTools
from services.rollout.weights import WeightKeeper
from services.rollout.worker import RolloutWorker
from singlestream.config import RolloutConfig
from singlestream.contracts import (
    Lease,
    Message,
    PosteriorUpdate,
    TensorEntry,
    Tombstone,
    Trajectory,
    WeightManifest,
    decode,
    encode,
)
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import GROUP, Keys, LeaseConsumer, connect
from tests.services.rollout.policies import character_tokenizer, publish
from tests.services.rollout.scripted import ScriptedEngine, ScriptedSandbox, lease

TOKENIZER = character_tokenizer()
BOX = "\\boxed{7}"
CALL = "<code>abc</code>"
BYTES = b"\x00\x00\x80\x3f"


def raises(_: Response) -> float:
    raise RuntimeError("the user's grader is broken")


def not_a_number(_: Response) -> float:
    return math.nan


released: list[asyncio.Event] = []


async def waits(_: Response) -> float:
    await released[-1].wait()
    return 1.0


def manifest(folder: Path, name: str = "weights") -> WeightManifest:
    path = folder / name
    path.write_bytes(BYTES)
    entry = TensorEntry(name="w", dtype="float32", shape=[1], offset=0, nbytes=4, crc32=zlib.crc32(BYTES))
    return WeightManifest(path=str(path), total_bytes=4, tensors=[entry])


class Site:
    """A run's Redis keys and as many workers as a test wants."""

    def __init__(self, redis: Redis, keys: Keys, folder: Path) -> None:
        self.redis, self.keys, self.folder = redis, keys, folder
        self.sandbox = ScriptedSandbox()
        self.tools_are_healthy = True

    def worker(self, name: str, engine: Any, redis: Redis | None = None, **changes: Any) -> RolloutWorker:
        settings = RolloutConfig(
            **{
                "slots": 4,
                "max_model_tokens": 1024,
                "max_response_tokens": 256,
                "max_turns": 4,
                "lease_timeout_s": 30.0,
                "stop_timeout_s": 10.0,
                "weights_timeout_s": 20.0,
                **changes,
            }
        )
        client, metrics = redis or self.redis, Metrics()
        keeper = WeightKeeper(client, self.keys, engine, ModelTensors({"w": (1,)}, False), settings, metrics)
        runner = LeaseRunner(
            LeaseConsumer(client, self.keys, name),
            engine,
            keeper,
            lambda environment: make_environment(environment, TOKENIZER),
            lambda: SandboxTools(self.sandbox, settings, metrics),
            self._healthy,
            settings,
            metrics,
        )
        return RolloutWorker(runner, f"node of {name}")

    async def _healthy(self) -> bool:
        return self.tools_are_healthy

    async def publish(self, version: int) -> None:
        await publish(self.redis, self.keys, manifest(self.folder, f"v{version}"), version)

    async def add(self, *leases: Lease) -> None:
        for one in leases:
            stream = self.keys.leases(one.purpose)
            entry = await self.redis.xadd(stream, {"id": one.lease_id, "m": encode(one)})
            await self.redis.hset(self.keys.live, one.lease_id, entry)

    async def ended(self, purpose: str = "train") -> list[Message]:
        entries = await self.redis.xrange(self.keys.results(purpose))  # type: ignore[arg-type]
        return [decode(fields[b"m"]) for _, fields in entries]

    async def until_ended(self, count: int, purpose: str = "train", deadline_s: float = 30.0) -> list[Message]:
        await until(lambda: self._count(purpose, count), f"{count} leases to end", deadline_s)
        return await self.ended(purpose)

    async def _count(self, purpose: str, count: int) -> bool:
        return await self.redis.xlen(self.keys.results(purpose)) >= count  # type: ignore[arg-type]


async def until(condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float = 30.0) -> None:
    started = time.monotonic()
    while not await condition():
        assert time.monotonic() - started < deadline_s, f"waited for {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
async def site(redis: Redis, keys: Keys, tmp_path: Path) -> Site:
    site = Site(redis, keys, tmp_path)
    await site.publish(0)
    return site


class Working:
    """A worker that runs while the block does."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker

    async def __aenter__(self) -> RolloutWorker:
        self.task = asyncio.create_task(self.worker.run())
        return self.worker

    async def __aexit__(self, *_: object) -> None:
        self.worker.stop()
        await self.task


async def test_two_workers_end_every_lease_once(site: Site) -> None:
    leases = [lease(n) for n in range(1, 41)]
    await site.add(*leases)
    engine = ScriptedEngine(TOKENIZER, [CALL, BOX])
    async with Working(site.worker("a", engine)) as a, Working(site.worker("b", engine)) as b:
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
        await until(lambda: _true(len(worker.running) == 3), "three running episodes")
        await asyncio.sleep(1.2)
        assert len(worker.running) == 3
        pending = [await site.redis.xpending(site.keys.leases(p), GROUP) for p in ("train", "estimate", "evaluate")]
        assert sum(one["pending"] for one in pending) == 3


async def test_a_sampled_episode_leaves_its_slot_before_it_is_graded(site: Site) -> None:
    released.append(asyncio.Event())
    await site.add(*(lease(n, environment=f"tiny_tool/{__name__}:waits") for n in range(1, 5)))
    engine = ScriptedEngine(TOKENIZER, [BOX])
    async with Working(site.worker("a", engine, slots=1)) as worker:
        await until(lambda: _true(len(engine.requests) == 2), "the second episode, while the first is graded")
        await asyncio.sleep(0.5)
        assert len(engine.requests) == len(worker.running) == 2  # and no third: graders are waited for in the end
        assert worker.report()["in_use"] == 0
        assert await site.ended() == []
        released[-1].set()
        await site.until_ended(4)


async def _true(value: bool) -> bool:
    return value


async def test_a_stopped_worker_hands_over_and_another_goes_on(site: Site) -> None:
    await site.add(*(lease(n) for n in range(1, 4)))
    engine = ScriptedEngine(TOKENIZER, [CALL, "it is " + BOX], stall=(1, 4))
    first = site.worker("a", engine)
    async with Working(first):
        await until(lambda: _true(len(engine.requests) == 6), "three second turns")
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


async def test_a_replica_that_does_not_sign_off_is_not_waited_for_longer(site: Site) -> None:
    report = {"node": "n", "at_s": time.time() + 60}
    await site.redis.hset(site.keys.replicas, "hung", json.dumps(report))
    assert not await handed_over(site.redis, site.keys, "n", deadline_s=0.5)
    await site.redis.hset(site.keys.replicas, "hung", json.dumps(report | {"at_s": time.time() - 60}))
    assert await handed_over(site.redis, site.keys, "n", deadline_s=30.0)


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
        await until(lambda: _true(worker.metrics.handed_over.labels("tool")._value.get() == 1), "the fault")
        await asyncio.sleep(1.5)
        assert await site.ended() == []
        assert len(engine.requests) == 1
        site.tools_are_healthy = True
        ended = await site.until_ended(3)
    assert Counter(one.attempts for one in ended) == {1: 2, 2: 1}  # type: ignore[attr-defined]


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
    assert all(one.attempts == 2 for one in ended)  # type: ignore[attr-defined]


async def test_no_lease_is_claimed_just_after_redis_was_away(site: Site) -> None:
    """Its holder could not keep it alive either: a long outage would cost every episode of the run an attempt."""
    await site.add(lease(1))
    holder = LeaseConsumer(site.redis, site.keys, "holder")
    await holder.join()
    [held] = await holder.take(["train"], 1, 100)
    long_ago_ms = 7_200_000
    await site.redis.xclaim(site.keys.leases("train"), GROUP, "holder", 0, [held.entry], idle=long_ago_ms, justid=True)
    worker = site.worker("a", ScriptedEngine(TOKENIZER, [BOX]), lease_timeout_s=3600.0)

    async def away() -> None:
        worker.stop()  # after this round
        raise ConnectionError("away")

    await worker._every(60.0, "report", away)
    await worker._claim()
    assert await holder.heartbeat([held]) == []
    await site.redis.xclaim(site.keys.leases("train"), GROUP, "holder", 0, [held.entry], idle=long_ago_ms, justid=True)
    worker._redis_away_at_s -= 1800.0
    await worker._claim()
    assert await holder.heartbeat([held]) == [held.lease.lease_id]


async def test_an_episode_whose_lease_was_taken_away_is_cancelled(site: Site) -> None:
    await site.add(lease(1))
    engine = ScriptedEngine(TOKENIZER, [BOX], stall=(0, 2))
    async with Working(site.worker("a", engine, lease_timeout_s=4.0)) as worker:
        await engine.stalled.wait()
        entry = (await site.redis.hget(site.keys.live, "train:0000abcd:1")).decode()
        await site.redis.xclaim(site.keys.leases("train"), GROUP, "thief", 0, [entry])
        await until(lambda: _true(not worker.running), "the cancelled episode")
        assert worker.metrics.lost._value.get() == 1
    assert await site.redis.hlen(site.keys.live) == 1
    assert await site.ended() == []


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
            await until(lambda: _true(len(engine.requests) >= 4), "two second turns")
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
