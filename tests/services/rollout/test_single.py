"""One replica without Ray: a hung engine is told from a busy one, and the process ends with its engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import psutil
import pytest
import pytest_asyncio

from singlestream.contracts import Lease, decode
from singlestream.streams import persist
from tests.services.rollout.service import START_S, Service, running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]


MANY = 400
"""Leases for longer than the test takes, on a slow machine too."""


async def health(service: Service, wanted: int) -> str:
    """Ask until the answer is the wanted one; returns its body."""
    started = time.monotonic()
    async with httpx.AsyncClient(timeout=60) as client:
        while True:
            reply = await client.get(f"http://127.0.0.1:{service.port}/healthz")
            if reply.status_code == wanted:
                return reply.text
            assert time.monotonic() - started < START_S, f"waited for {wanted}: {reply.text}"


def engine_core(service: Service) -> psutil.Process:
    children = psutil.Process(service.process.pid).children()
    lines = [one.as_dict(["cmdline"], ad_value=[])["cmdline"] for one in children]  # a zombie has none
    [core] = [one for one, line in zip(children, lines, strict=True) if "EngineCore" in " ".join(line)]
    return core


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Service, Service]]:
    """Two that start at the same time: it takes little longer than one."""
    busy, idle = (tmp_path_factory.mktemp(name) for name in ("busy", "idle"))
    async with running(busy, "--no-ray", engine_timeout_s=8) as one, running(idle, "--no-ray") as other:
        for service in (one, other):
            await service.until(lambda told: told, 1, "replicas")
        yield one, other


async def test_a_hung_engine_is_unhealthy_and_a_dead_one_ends_the_process(services: tuple[Service, Service]) -> None:
    service, _ = services
    await service.add(MANY, 0)
    await service.busy()
    core = engine_core(service)
    await health(service, 200)  # busy, and well

    core.suspend()
    assert "the engine's answer" in await health(service, 503)
    core.resume()
    await health(service, 200)

    async with httpx.AsyncClient() as client:
        metrics = (await client.get(f"http://127.0.0.1:{service.port}/metrics")).text
    told = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line[:1] != "#"}
    assert told["singlestream_rollout_engine_running"] >= 1
    assert 0 < told["singlestream_rollout_kv_cache_ratio"] <= 1
    assert told["singlestream_rollout_sampled_tokens_total"] > 0
    assert told["singlestream_rollout_prefix_cache_queries_total"] > 0

    core.kill()
    assert await asyncio.to_thread(service.process.wait, 180) == 1
    ended = await service.redis.xlen(service.keys.trajectories)
    back = [decode(fields[b"m"]) for _, fields in await service.redis.xrange(service.keys.leases("train"))]
    assert ended + len(back) == MANY
    assert {one.attempts for one in back if isinstance(one, Lease)} == {0, 1}
    assert await service.reports() == {}


async def test_an_operator_is_told_that_redis_is_away(services: tuple[Service, Service]) -> None:
    _, service = services
    orders = (("PUT", "/v1/scale", {"replicas": 3}), ("POST", "/v1/control", {"action": "pause"}))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
        await asyncio.to_thread(service.server.kill)
        for method, path, body in orders:
            reply = await client.request(method, path, json=body)
            assert reply.status_code == 503
            assert "Redis is away, nothing may have changed" in reply.json()["detail"]
        assert (await client.get("/healthz")).status_code == 200
        await asyncio.to_thread(service.server.start)
        started = time.monotonic()
        for method, path, body in orders:
            while (reply := await client.request(method, path, json=body)).status_code != 200:
                assert time.monotonic() - started < START_S, reply.text
    assert await persist(lambda: service.redis.get(service.keys.rollout_cap), "the cap", START_S) == b"3"


async def test_the_process_ends_with_an_idle_engine_too(services: tuple[Service, Service]) -> None:
    _, service = services
    engine_core(service).kill()
    assert await asyncio.to_thread(service.process.wait, 180) == 1
    assert await service.reports() == {}
