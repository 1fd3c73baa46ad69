"""A run's Redis keys, workers with scripted engines on them, and what the leases came to."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from services.rollout.environments import make_environment
from services.rollout.lease_run import LeaseRunner
from services.rollout.manifest import ModelTensors
from services.rollout.metrics import Metrics
from services.rollout.tools import SandboxTools
from services.rollout.weights import WeightKeeper
from services.rollout.worker import RolloutWorker
from singlestream.config import RolloutConfig
from singlestream.contracts import (
    Lease,
    Message,
    TensorEntry,
    WeightManifest,
    decode,
    encode,
)
from singlestream.streams import Keys, LeaseConsumer
from tests.services.rollout.policies import character_tokenizer, publish
from tests.services.rollout.scripted import ScriptedSandbox

TOKENIZER = character_tokenizer()
BOX = "\\boxed{7}"
CALL = "<code>abc</code>"
BYTES = b"\x00\x00\x80\x3f"


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

    async def publish(self, version: int, readable: bool = True) -> None:
        """Announce a version; of one that is not readable, the file is gone."""
        told = manifest(self.folder, f"v{version}")
        if not readable:
            told = told.model_copy(update={"path": f"{told.path} is gone"})
        await publish(self.redis, self.keys, told, version)

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


async def true(value: bool) -> bool:
    return value
