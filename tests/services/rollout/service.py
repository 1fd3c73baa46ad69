"""`python -m services.rollout` in a process of its own, with a Redis and a tiny policy that never ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis

from singlestream.contracts import Lease, Sampling, Trajectory, decode, encode
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from tests.ports import free_port
from tests.services.rollout import policies

ROOT = Path(__file__).resolve().parents[3]
SLOTS = 4
RESPONSE_TOKENS = 400
START_S = 400.0
ADD = """
for one = 1, #ARGV, 2 do
    local entry = redis.call("XADD", KEYS[1], "*", "id", ARGV[one], "m", ARGV[one + 1])
    redis.call("HSET", KEYS[2], ARGV[one], entry)
end
"""


class Service:
    """The service under test.

    Args:
        folder: for its logs and weights.
        server: its Redis.
        redis: a client of it.
        keys: of its run.
        port: of its HTTP interface.
        environment: its settings.
        arguments: of its command line.
    """

    def __init__(
        self,
        folder: Path,
        server: EmbeddedRedis,
        redis: Redis,
        keys: Keys,
        port: int,
        environment: dict[str, str],
        arguments: tuple[str, ...],
    ) -> None:
        self.folder, self.server, self.redis, self.keys = folder, server, redis, keys
        self.port, self.environment = port, environment
        self.leases = 0
        self.process = self.start("log", "services.rollout", *arguments)

    def start(self, log: str, module: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Run a module with the service's settings."""
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments, "--config", str(self.folder / "run.toml")],
                cwd=ROOT,
                env=self.environment | environment,
                stdout=file,
                stderr=file,
            )

    async def publish(self, seed: int, version: int) -> None:
        manifest = policies.write_weights(policies.random_policy(seed, eos=None), self.folder / f"v{version}")
        await policies.publish(self.redis, self.keys, manifest, version)

    async def scale(self, replicas: int) -> None:
        command = self.start("scale.log", "singlestream.cli.main", "scale", "rollout", str(replicas))
        assert await asyncio.to_thread(command.wait, 60) == 0, (self.folder / "scale.log").read_text()

    async def told(self, action: str, replicas: set[str]) -> list[dict[str, Any]]:
        """`control`, once Serve knows all of these replicas, which is a little after their first report."""
        started = time.monotonic()
        while True:
            answers = await self.control(action)
            if {one["replica"] for one in answers} == replicas:
                return answers
            assert time.monotonic() - started < START_S, f"waited for {replicas} to be told: {answers}"
            await asyncio.sleep(0.2)

    async def control(self, action: str) -> list[dict[str, Any]]:
        """``POST /v1/control``: what every replica says it is like afterwards."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
            reply = await client.post("/v1/control", json={"action": action})
        assert reply.status_code == 200, reply.text
        return list(reply.json()["replicas"])

    async def add(self, count: int, version: int, question: str | None = None) -> tuple[int, int]:
        """Leases of long generations (the policy never ends); returns the first number and that after the last."""
        arguments: list[str | bytes] = []
        for _ in range(count):
            self.leases += 1
            one = Lease(
                lease_id=f"train:0000abcd:{self.leases}",
                prompt_id=f"p{self.leases}",
                question=question or "".join(chr(97 + (self.leases * 7 + place) % 26) for place in range(30)),
                answer="7",
                environment="single_turn",
                v_hat=0.5,
                version=version,
                lineage=1,
                sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0),
                issued_at_s=time.time(),
            )
            arguments += [one.lease_id, encode(one)]
        await self.redis.eval(ADD, 2, self.keys.leases("train"), self.keys.live, *arguments)
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

    async def feed(
        self, version: int, enough: Callable[[dict[str, dict[str, Any]]], Any], what: str, question: str | None = None
    ) -> None:
        """Keep leases waiting for the replicas until their reports are as wanted."""
        started = time.monotonic()
        while not enough(told := await self.reports()):
            assert time.monotonic() - started < START_S, f"waited for {what}: {told}"
            if await self.redis.xlen(self.keys.leases("train")) < 12 * SLOTS:  # or a slow test starves them
                await self.add(4 * SLOTS, version, question)
            await asyncio.sleep(0.05)

    async def ended(self, count: int, deadline_s: float = START_S) -> list[Trajectory]:
        started = time.monotonic()
        while await self.redis.xlen(self.keys.trajectories) < count:
            assert time.monotonic() - started < deadline_s, f"{await self.redis.xlen(self.keys.trajectories)} ended"
            await asyncio.sleep(0.2)
        entries = await self.redis.xrange(self.keys.trajectories)
        messages = [decode(fields[b"m"]) for _, fields in entries]
        assert all(isinstance(message, Trajectory) for message in messages)
        return messages  # type: ignore[return-value]


@asynccontextmanager
async def running(folder: Path, *arguments: str, **rollout: object) -> AsyncIterator[Service]:
    """The service with one replica and version 0 published, until the block ends.

    Args:
        folder: an empty one.
        arguments: of its command line.
        rollout: settings of section ``rollout``, beside those that every test shares.
    """
    model = policies.save_policy(policies.random_policy(1, eos=None), folder / "model", ends=False)
    port, name = free_port(), "replicas"
    settings = {
        "RUN__NAME": name,
        "RUN__MODEL": model,
        "RUN__TOTAL_STEPS": 1,
        "RUN__ENGINE_DTYPE": "float32",
        "ROLLOUT__PORT": port,
        "ROLLOUT__SLOTS": SLOTS,
        "ROLLOUT__MAX_MODEL_TOKENS": RESPONSE_TOKENS + 100,
        "ROLLOUT__MAX_RESPONSE_TOKENS": RESPONSE_TOKENS,
        "ROLLOUT__KV_CACHE_GIB": 0.1,
        "ROLLOUT__CPU_THREADS": 1,
        **{f"ROLLOUT__{key.upper()}": value for key, value in rollout.items()},
    }
    with tempfile.TemporaryDirectory(prefix="ss-") as socket_folder:
        server = EmbeddedRedis(Path(socket_folder), fsync="no")
        server.start()
        settings["RUN__REDIS_URL"] = server.url
        (folder / "run.toml").write_text("")
        environment = {f"SINGLESTREAM_{key}": str(value) for key, value in settings.items()}
        environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        redis = connect(server.url)
        service = Service(folder, server, redis, Keys(name), port, environment, arguments)
        try:
            await service.publish(1, 0)
            yield service
        finally:
            service.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.process.wait(60)
            service.process.kill()
            service.process.wait()
            print((folder / "log").read_text(errors="replace")[-20_000:])
            await redis.aclose()
            server.stop()
