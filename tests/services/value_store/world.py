"""The services around the store, by hand but over the real streams: a replica that plays, a learner that trains."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from services.value_store import loops
from services.value_store.ending import end
from services.value_store.evidence import decode_entries
from services.value_store.prompts import Prompt
from services.value_store.store import Store
from singlestream.config import Config
from singlestream.contracts import (
    Lease,
    PolicyVersion,
    PosteriorUpdate,
    Segment,
    TensorEntry,
    Trajectory,
    WeightManifest,
    decode,
    decode_closing,
)
from singlestream.streams import Held, Keys, LearnerStreams, LeaseConsumer
from singlestream.streams.ledger import LedgerCounts, read_ledger


def make_config(keys: Keys, redis_url: str = "unix:///none", port: int = 18100, **changes: Any) -> Config:
    run = {"name": keys.run, "model": Path("none"), "total_steps": 50, "train_batch_size": 4, "max_staleness": 1}
    store = {"port": port, **changes.pop("value_store", {})}
    learner = changes.pop("learner", {})
    return Config(run={**run, "redis_url": redis_url, **changes}, value_store=store, learner=learner)  # type: ignore[arg-type]


def make_prompts(count: int, split: str = "train", source: str = "s") -> list[Prompt]:
    return [Prompt(f"question {i}", str(i), source, "math_python", split) for i in range(count)]  # type: ignore[arg-type]


def make_trajectory(lease: Lease, reward: float, version: int | None = None) -> Trajectory:
    generated = Segment(
        kind="generated",
        token_ids=[8, 9],
        logprobs=[-0.5, -0.25],
        version=lease.version if version is None else version,
        lineage=1,
        replica="r1",
    )
    return Trajectory(
        lease_id=lease.lease_id,
        prompt_id=lease.prompt_id,
        job=lease.job,
        segments=[Segment(kind="prompt", token_ids=[1]), generated, Segment(kind="observation", token_ids=[3, 4])],
        reward=reward,
        v_hat=lease.v_hat,
        end_reason="stop",
        turns=1,
        attempts=1,
        started_at_s=1.0,
        finished_at_s=2.0,
    )


def evidence(trajectory: Trajectory, outcome: str = "trained") -> PosteriorUpdate:
    return PosteriorUpdate(
        lease_id=trajectory.lease_id,
        prompt_id=trajectory.prompt_id,
        outcome=outcome,  # type: ignore[arg-type]
        reward=trajectory.reward,
        version=trajectory.last_version,
    )


class World:
    """A replica named r1 and a learner."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self.replica = LeaseConsumer(redis, keys, "r1")
        self.learner = LearnerStreams(redis, keys)
        self.cursor = "0-0"

    async def start(self, slots: int = 32) -> None:
        await self.replica.join()
        await self.learner.take_over()
        await self.report(slots)

    async def report(self, slots: int = 32) -> None:
        report = {"slots": slots, "in_use": 0, "version": 0, "lineage": 1, "at_s": time.time()}
        await self.redis.hset(self.keys.replicas, "r1", json.dumps(report))

    async def publish(self, version: int, z: float | None = None) -> None:
        tensor = TensorEntry(name="w", dtype="float32", shape=[1], offset=0, nbytes=4, crc32=0)
        await self.learner.publish(
            PolicyVersion(
                version=version,
                lineage=1,
                z=0.05 * version if z is None else z,
                drift=0.003,
                manifest=WeightManifest(path="none", total_bytes=4, tensors=[tensor]),
                published_at_s=time.time(),
            )
        )

    async def take(self, count: int = 64) -> list[Held]:
        return await self.replica.take(["train", "estimate", "evaluate"], count, block_ms=None)

    async def play(self, reward: Callable[[Lease], float] = lambda _: 1.0, count: int = 64) -> list[Trajectory]:
        """Take what is there and finish it."""
        played = []
        for held in await self.take(count):
            trajectory = make_trajectory(held.lease, reward(held.lease))
            assert await self.replica.emit(held, trajectory)
            played.append(trajectory)
        return played

    async def read(self) -> list[Any]:
        """New entries of the trajectory stream."""
        entries = await self.learner.read(self.cursor, 1000, block_ms=None)
        if entries:
            self.cursor = entries[-1][0]
        return [decode(data) for _, _, data in entries]

    async def train(self, outcome: str = "trained") -> list[PosteriorUpdate]:
        """Send an update for every new trajectory."""
        updates = [evidence(one, outcome) for one in await self.read() if isinstance(one, Trajectory)]
        await self.learner.send_updates(updates)
        return updates

    async def ledger(self) -> dict[str, LedgerCounts]:
        counts = await read_ledger(self.redis, self.keys)
        assert all(one.adds_up for one in counts.values()), counts
        return counts  # type: ignore[return-value]


async def wake(store: Store) -> None:
    """Let the store read Redis once."""
    await store._read_anew()
    await read_versions(store)


async def read_versions(store: Store) -> None:
    memory = store.memory
    entries = await store.streams.read_stream(store.keys.policy_versions, memory.versions_cursor, 100, None)
    for entry, _, data in entries:
        store.note_version(memory.epoch, entry, data)


async def settle(store: Store) -> None:
    """Apply everything that waits in the streams."""
    await read_versions(store)
    for stream, take, read in (
        (store.keys.posterior_updates, store.take_updates, decode_closing),
        (store.keys.scored, store.take_results, decode),
    ):
        after = store.memory.cursors.get(stream, "0-0")
        entries = await store.streams.read_stream(stream, after, 100_000, None)
        if entries:
            await take(store.memory.epoch, decode_entries(entries, read))


class Running:
    """A store with its loops, in this process."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def __aenter__(self) -> Store:
        store = self.store
        self.tasks = [
            asyncio.create_task(work)
            for work in (
                store.keep_ready(),
                loops.follow_updates(store),
                loops.follow_results(store),
                loops.follow_versions(store),
                loops.issue_leases(store),
            )
        ]
        await asyncio.wait_for(store.until_ready(), 60)
        return store

    async def __aexit__(self, *_: object) -> None:
        await end(self.tasks)
        for result in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
                raise result


async def until(condition: Callable[[], Any], what: str, deadline_s: float = 60.0, every_s: float = 0.02) -> None:
    """Wait for a condition, plain or awaitable."""
    started = time.monotonic()
    while True:
        met = condition()
        if asyncio.iscoroutine(met):
            met = await met
        if met:
            return
        assert time.monotonic() - started < deadline_s, f"waited {deadline_s} s for {what}"
        await asyncio.sleep(every_s)
