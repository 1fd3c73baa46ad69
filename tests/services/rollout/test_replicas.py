"""Replicas under Ray Serve with real engines: one is killed, one is frozen, all are stopped; every lease ends once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from singlestream.contracts import Lease, Sampling, Trajectory, decode, encode
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from tests.services.rollout import policies

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(480)]

ROOT = Path(__file__).resolve().parents[3]
SLOTS = 4
MANY = 160
"""Leases for many rounds of all slots: whenever a replica is touched, it has some in its hands."""
RESPONSE_TOKENS = 400
START_S = 240.0
LEASE_TIMEOUT_S = 4.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Service:
    """`python -m services.rollout` with its own Redis."""

    def __init__(self, folder: Path, redis: Redis, keys: Keys, port: int, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.redis, self.keys, self.port, self.process = folder, redis, keys, port, process
        self.leases = 0

    async def publish(self, seed: int, version: int) -> None:
        manifest = policies.write_weights(policies.random_policy(seed, eos=None), self.folder / f"v{version}")
        await policies.publish(self.redis, self.keys, manifest, version)

    async def scale(self, replicas: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
            assert (await client.put("/v1/scale", json={"replicas": replicas})).status_code == 200

    async def add(self, count: int, version: int) -> tuple[int, int]:
        """Leases of long generations (the policy never ends); returns the first number and that after the last."""
        for _ in range(count):
            self.leases += 1
            one = Lease(
                lease_id=f"train:0000abcd:{self.leases}",
                prompt_id=f"p{self.leases}",
                question="".join(chr(97 + (self.leases * 7 + place) % 26) for place in range(30)),
                answer="7",
                environment="single_turn",
                v_hat=0.5,
                version=version,
                lineage=1,
                sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0),
                issued_at_s=time.time(),
            )
            entry = await self.redis.xadd(self.keys.leases("train"), {"id": one.lease_id, "m": encode(one)})
            await self.redis.hset(self.keys.live, one.lease_id, entry)
        return self.leases - count + 1, self.leases + 1

    async def reports(self) -> dict[str, dict[str, Any]]:
        """What the replicas say, by name."""
        told = await self.redis.hgetall(self.keys.replicas)
        return {name.decode(): json.loads(value) for name, value in told.items()}

    async def busy(self, count: int = 1) -> Any:
        """Wait for so many fresh replicas that all have episodes running."""
        return await self.until(lambda told: {n: r for n, r in told.items() if r["in_use"]}, count, "busy replicas")

    async def until(self, choose: Any, count: int, what: str, deadline_s: float = START_S) -> Any:
        started = time.monotonic()
        while True:
            fresh = {n: r for n, r in (await self.reports()).items() if time.time() - r["at_s"] < 5}
            if len(chosen := choose(fresh)) >= count:
                return chosen
            assert self.process.poll() is None, "the service ended"
            assert time.monotonic() - started < deadline_s, f"waited for {count} {what}: {await self.reports()}"
            await asyncio.sleep(0.2)

    async def ended(self, count: int, deadline_s: float = 120.0) -> list[Trajectory]:
        started = time.monotonic()
        while await self.redis.xlen(self.keys.trajectories) < count:
            assert time.monotonic() - started < deadline_s, f"{await self.redis.xlen(self.keys.trajectories)} ended"
            await asyncio.sleep(0.2)
        entries = await self.redis.xrange(self.keys.trajectories)
        messages = [decode(fields[b"m"]) for _, fields in entries]
        assert all(isinstance(message, Trajectory) for message in messages)
        return messages  # type: ignore[return-value]


def pid_of(replica: str) -> int:
    """A replica's name holds its process number."""
    return int(replica.rsplit("-", 2)[1])


def engine_processes(replica: str) -> list[psutil.Process]:
    return psutil.Process(pid_of(replica)).children(recursive=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("replicas")
    model = policies.save_policy(policies.random_policy(1, eos=None), folder / "model", ends=False)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ss-") as socket_folder:
        server = EmbeddedRedis(Path(socket_folder), fsync="no")
        server.start()
        settings = {
            "SINGLESTREAM_RUN__NAME": "replicas",
            "SINGLESTREAM_RUN__MODEL": str(model),
            "SINGLESTREAM_RUN__TOTAL_STEPS": "1",
            "SINGLESTREAM_RUN__REDIS_URL": server.url,
            "SINGLESTREAM_RUN__ENGINE_DTYPE": "float32",
            "SINGLESTREAM_ROLLOUT__PORT": str(port),
            "SINGLESTREAM_ROLLOUT__REPLICAS": "1",
            "SINGLESTREAM_ROLLOUT__SLOTS": str(SLOTS),
            "SINGLESTREAM_ROLLOUT__MAX_MODEL_TOKENS": "500",
            "SINGLESTREAM_ROLLOUT__MAX_RESPONSE_TOKENS": str(RESPONSE_TOKENS),
            "SINGLESTREAM_ROLLOUT__LEASE_TIMEOUT_S": str(LEASE_TIMEOUT_S),
            "SINGLESTREAM_ROLLOUT__KV_CACHE_GIB": "0.1",
            "SINGLESTREAM_ROLLOUT__CPU_THREADS": "1",
        }
        (folder / "run.toml").write_text("")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: ASYNC220  a fixture may wait
                [sys.executable, "-m", "services.rollout", "--config", str(folder / "run.toml")],
                cwd=ROOT,
                env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        redis = connect(server.url)
        one = Service(folder, redis, Keys("replicas"), port, process)
        await one.publish(1, 0)
        yield one
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
        print((folder / "log").read_text(errors="replace")[-20_000:])
        await redis.aclose()
        server.stop()


async def test_a_second_replica_joins_and_loads_the_newest_weights_first(service: Service) -> None:
    [alone] = await service.until(lambda told: told, 1, "replicas")
    await service.add(4, 0)
    await service.ended(4)
    await service.publish(2, 1)
    await service.scale(2)
    await service.until(lambda told: set(told) - {alone}, 1, "new replicas")
    await service.add(12, 1)
    ended = (await service.ended(16))[4:]
    assert len({s.replica for one in ended for s in one.segments[1:]}) == 2
    assert {s.version for one in ended for s in one.segments[1:]} == {1}


async def test_a_killed_and_a_frozen_replica_lose_no_lease(service: Service) -> None:
    before = await service.redis.xlen(service.keys.trajectories)
    first, last = await service.add(MANY, 1)
    killed, frozen = sorted(await service.busy(2))

    children = engine_processes(killed)
    assert len(children) >= 2
    os.kill(pid_of(killed), signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 20)
    assert not alive, f"the engine outlived its replica: {alive}"
    await service.redis.hdel(service.keys.replicas, killed)

    stopped = [pid_of(frozen)]
    os.kill(stopped[0], signal.SIGSTOP)
    await asyncio.sleep(LEASE_TIMEOUT_S + 1)
    os.kill(stopped[0], signal.SIGCONT)

    ended = (await service.ended(before + MANY))[before:]
    assert Counter(one.lease_id for one in ended) == Counter(f"train:0000abcd:{n}" for n in range(first, last))
    assert max(one.attempts for one in ended) >= 2
    assert await service.redis.hlen(service.keys.live) == 0

    # Serve brings another, which loads the newest weights before it takes a lease
    await service.until(lambda told: set(told) - {killed, frozen}, 1, "new replicas")
    await service.add(12, 1)
    ended = (await service.ended(before + MANY + 12))[before + MANY :]
    assert {s.version for one in ended for s in one.segments if s.version is not None} == {1}
    newcomers = {s.replica for one in ended for s in one.segments if s.replica} - {killed, frozen}
    assert newcomers


async def test_a_replica_that_is_scaled_away_hands_over(service: Service) -> None:
    pair = set(await service.until(lambda told: told, 2, "replicas"))
    before = await service.redis.xlen(service.keys.trajectories)
    first, last = await service.add(12, 1)
    await service.busy(2)
    await service.scale(1)
    while len(await service.reports()) > 1:  # both stay busy until one has signed off
        if await service.redis.xlen(service.keys.leases("train")) < 12:
            _, last = await service.add(4, 1)
        await asyncio.sleep(0.1)
    ended = (await service.ended(before + last - first))[before:]
    assert Counter(one.lease_id for one in ended) == Counter(f"train:0000abcd:{n}" for n in range(first, last))
    # what one had sampled stands there, and the other went on from those tokens
    carried = [one for one in ended if len({s.replica for s in one.segments[1:]}) > 1]
    assert carried
    for one in carried:
        assert {s.replica for s in one.segments[1:]} == pair
        assert sum(len(s.token_ids) for s in one.segments[1:]) == RESPONSE_TOKENS
        assert one.attempts == 1


async def test_the_http_interface_runs_an_episode(service: Service) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).json()["version"] == 1
        assert "singlestream_rollout_reward_bucket" in (await client.get("/metrics")).text
        body = {"question": "3+4=?", "answer": "7", "environment": "single_turn"}
        trace = (await client.post("/v1/episodes", json=body)).json()
        assert trace["end_reason"] == "length"
        assert [segment["kind"] for segment in trace["segments"]] == ["prompt", "generated"]
        generated = trace["segments"][1]
        assert generated["version"] == 1
        assert len(generated["logprobs"]) == len(generated["token_ids"]) == RESPONSE_TOKENS
        refused = await client.post("/v1/episodes", json={**body, "environment": "no_such"})
        assert refused.status_code == 422


async def test_the_openai_client_works(service: Service) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none") as client:
        [model] = [one async for one in client.models.list()]
        assert model.id == "replicas"
        done = await client.completions.create(model=model.id, prompt="3+4=?", max_tokens=7, n=2, logprobs=0)
        assert [choice.finish_reason for choice in done.choices] == ["length", "length"]
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 14)
        assert len(done.choices[0].logprobs.token_logprobs) == 7
        messages = [{"role": "user", "content": "3+4=?"}]
        chat = await client.chat.completions.create(model=model.id, messages=messages, max_tokens=9, temperature=0)
        whole = chat.choices[0].message.content
        parts = []
        async for chunk in await client.chat.completions.create(
            model=model.id, messages=messages, max_tokens=9, temperature=0, stream=True
        ):
            parts.append(chunk.choices[0].delta.content)
        assert "".join(parts) == whole
        assert len(parts) > 1
        with pytest.raises(openai.UnprocessableEntityError):
            await client.chat.completions.create(model=model.id, messages=messages, response_format={"type": "text"})
        with pytest.raises(openai.UnprocessableEntityError):
            await client.completions.create(model=model.id, prompt="x" * 600)


async def test_a_stopped_service_hands_everything_over(service: Service) -> None:
    before = await service.redis.xlen(service.keys.trajectories)
    await service.add(MANY, 1)
    await service.busy(1)
    children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 90) == 0
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 20)
    assert not alive
    finished = await service.redis.xlen(service.keys.trajectories) - before
    waiting = [decode(f[b"m"]) for _, f in await service.redis.xrange(service.keys.leases("train"))]
    assert finished + len(waiting) == MANY
    carried = [one.progress for one in waiting if isinstance(one, Lease) and one.progress is not None]
    assert carried
    assert all(len(progress.segments[-1].token_ids) > 0 for progress in carried)
    assert all(isinstance(one, Lease) and one.attempts == 0 for one in waiting)
    assert await service.reports() == {}
