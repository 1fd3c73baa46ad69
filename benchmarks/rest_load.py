"""Load on the value store's REST: a bare HTTP/1.1 client, so that the store is measured and not the client."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from singlestream.clients.value_store import AsyncValueStore
from singlestream.config import Config
from singlestream.errors import DeadlineExceeded

FLOOR = "healthz"
"""Of the same server, an answer that says nothing: the limit of the others."""


@dataclass(frozen=True)
class Latency:
    """Of one kind of request at one number of connections."""

    p50_ms: float
    p99_ms: float
    per_s: float


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[asyncio.subprocess.Process]:
    """A store process for the run, ready to be asked."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        run, store = config.run, config.value_store
        file.write_text(
            f'[run]\nname = "{run.name}"\nmodel = "none"\nredis_url = "{run.redis_url}"\ntotal_steps = 1\n'
            f"[value_store]\nport = {store.port}\nmax_requests_per_s = 1e9\n"
            f"max_import_bytes = {store.max_import_bytes}\n"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.value_store",
            "--config",
            str(file),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            await _ready(f"http://127.0.0.1:{store.port}")
            yield process
        finally:
            process.terminate()
            await process.wait()


async def measure_rest(config: Config, ids: list[str], seconds: float) -> dict[tuple[str, int], Latency]:
    """Start a store for the run and load it with `FLOOR`, gets, lists and look-ups at 1, 16 and 64 connections."""
    async with running(config):
        return await _load(config.value_store.port, ids, seconds)


async def _ready(url: str, deadline_s: float = 60.0) -> None:
    started = time.monotonic()
    async with AsyncValueStore(url) as store:
        while not await store.ready():
            if time.monotonic() - started > deadline_s:
                raise DeadlineExceeded(f"the value store at {url}", deadline_s)
            await asyncio.sleep(0.05)


async def _load(port: int, ids: list[str], seconds: float) -> dict[tuple[str, int], Latency]:
    lookup = json.dumps({"ids": ids[:100]}).encode()
    kinds = {
        FLOOR: lambda i: _request("GET", "/healthz"),
        "get": lambda i: _request("GET", f"/v1/prompts/{ids[i * 7919 % len(ids)]}"),
        "list": lambda i: _request("GET", "/v1/prompts?order=value&descending=true&limit=50"),
        "lookup": lambda i: _request("POST", "/v1/values", lookup),
    }
    measured = {}
    for name, make in kinds.items():
        for connections in (1, 16, 64):
            times: list[float] = []
            until = time.perf_counter() + seconds
            started = time.perf_counter()
            await asyncio.gather(*(_client(port, make, i, until, times) for i in range(connections)))
            elapsed = time.perf_counter() - started
            quantiles = statistics.quantiles(times, n=100)
            measured[name, connections] = Latency(quantiles[49] * 1000, quantiles[98] * 1000, len(times) / elapsed)
    return measured


def _request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _client(port: int, make: object, number: int, until: float, times: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    i = number
    while (started := time.perf_counter()) < until:
        writer.write(make(i))  # type: ignore[operator]
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - started)
        i += 64
    writer.close()
    await writer.wait_closed()
