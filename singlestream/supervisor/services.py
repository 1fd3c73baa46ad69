"""The services of one machine, as child processes: their command lines and what makes each ready."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis

from singlestream.config import Config, Listening
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import LOST, Keys
from singlestream.supervisor.child import Spec

ANSWER_S = 5.0
"""A service that answers so late is not ready: it hangs, or its machine is overloaded."""
HEARTBEAT_S = 10.0
"""The learner writes its heartbeat every 2 s; one older than this is not taken as a sign of life."""


def http_ready(listening: Listening, run: str) -> Callable[[], Awaitable[str | None]]:
    """A check of ``GET /readyz``: None when it answers 200 for this run, else what the service says it waits for."""
    url = f"{listening.url}/readyz"

    async def ready() -> str | None:
        try:
            async with httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as client:
                reply = await client.get(url)
        except httpx.HTTPError as error:
            return f"an answer from {url} ({type(error).__name__})"
        try:
            body = reply.json()
        except ValueError:
            return f"{url} to answer 200 (it says {reply.status_code})"
        if reply.status_code == httpx.codes.OK:
            served = body.get("run", run)  # the sandbox serves any run
            return None if served == run else f"its port: {listening.url} serves run {served!r}"
        said = str(body.get("waiting_for") or body.get("detail") or f"{url} to answer 200")
        return said.removeprefix("the value store waits for ")

    return ready


def redis_ready(redis: Redis) -> Callable[[], Awaitable[str | None]]:
    """A check that the server answers and has loaded its file."""

    async def ready() -> str | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await redis.ping()
        except LOST as error:
            return f"its first answer ({type(error).__name__})"
        return None

    return ready


def learner_ready(redis: Redis, keys: Keys) -> Callable[[], Awaitable[str | None]]:
    """A check that the learner's heartbeat is fresh and its first weights are published."""

    async def ready() -> str | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                text = await redis.get(keys.learner)
                published = await redis.exists(keys.policy_versions)
        except LOST as error:
            return f"Redis ({type(error).__name__})"
        heartbeat = json.loads(text) if text else None
        if heartbeat is None:
            return "its first heartbeat"
        if (age_s := time.time() - heartbeat["at_s"]) > HEARTBEAT_S:
            return f"a heartbeat; the last one came {age_s:.0f} s ago"
        return None if published else "its first policy version"

    return ready


def checks(config: Config, redis: Redis) -> dict[str, Callable[[], Awaitable[str | None]]]:
    """What tells of each service whether it is ready: None, or what it waits for."""
    run = config.run.name
    return {
        "redis": redis_ready(redis),
        "sandbox_gateway": http_ready(config.sandbox_gateway, run),
        "value_store": http_ready(config.value_store, run),
        "rollout": http_ready(config.rollout, run),
        "learner": learner_ready(redis, Keys(run)),
    }


def specs(config: Config, config_path: Path, server: EmbeddedRedis, redis: Redis) -> list[list[Spec]]:
    """The services in starting order; those of one inner list start together."""
    ready = checks(config, redis)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    env = {
        "SINGLESTREAM_CONFIG": str(config_path.resolve()),
        "SINGLESTREAM_RUN__REDIS_URL": server.url,
        "OMP_NUM_THREADS": threads,
        # Services share the cores: threads that spin while they wait would slow each other 10-30 times.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONUNBUFFERED": "1",
    }

    def service(name: str, **changes: Any) -> Spec:
        return Spec(name, [sys.executable, "-m", f"services.{name}"], ready[name], env, **changes)

    return [
        [Spec("redis", server.command(), ready["redis"])],
        [service("sandbox_gateway"), service("value_store")],
        [service("rollout", ready_s=600.0), service("learner", ready_s=300.0, completes=True)],
    ]
