"""The value store against its limits: updates, one draw, start-up and memory at a million prompts, REST latency.

``python -m benchmarks.value_store --json FILE``. Each figure names its limit: an aim (`AIMS`), Redis' own rate for the
same commands and bytes, or the same server's emptiest answer.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import uvicorn
from redis.asyncio import Redis

from benchmarks import harness
from benchmarks.exchange_load import measure_exchange
from benchmarks.harness import Figure
from benchmarks.redis_rate import seconds_of, together, update_commands
from benchmarks.rest_load import FLOOR, Latency, measure_rest, running
from services.value_store import issuing, loops, sampler
from services.value_store.memory import Memory, OpenLease
from services.value_store.prompts import Prompt
from services.value_store.store import ENTRIES_PER_SCRIPT, Store
from services.value_store.table import new_record
from singlestream.config import Config
from singlestream.contracts import PosteriorUpdate, encode
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from singlestream.streams.ledger import Change, ValueStoreStreams

DRAW = 1024
AIMS = {
    "updates_per_s": 50_000,
    "draw_1024_of_1m_ms": 20,
    "startup_1m_s": 10,
    "bytes_per_prompt": 400,
    "get_p99_over_p50_c16": 5,
}
"""At least the first, at most the others."""


def make_config(run: str, redis_url: str, port: int = 18190) -> Config:
    """Settings of a benchmark's run."""
    return Config(
        run={"name": run, "model": Path("none"), "total_steps": 10**6, "redis_url": redis_url},  # type: ignore[arg-type]
        value_store={"port": port, "max_requests_per_s": 1e9},  # type: ignore[arg-type]
    )


async def fill(redis: Redis, keys: Keys, prompts: int, texts: bool) -> list[str]:
    """Prompts without visits, straight into Redis; returns their ids."""
    rng = np.random.default_rng(0)
    counts = rng.uniform(0.5, 12.0, (prompts, 2))
    ids = []
    for start in range(0, prompts, 10_000):
        part = [
            Prompt(f"question {i}", str(i), "bench", "math_python", "train")
            for i in range(start, min(start + 10_000, prompts))
        ]
        names = [prompt.prompt_id for prompt in part]
        records = [new_record(*counts[start + i], "train", "bench", 0.0) for i in range(len(part))]
        await redis.hset(keys.values, mapping=dict(zip(names, records, strict=True)))
        if texts:
            await redis.hset(keys.prompts, mapping={p.prompt_id: p.pack() for p in part})
        ids += names
    return ids


async def seed_updates(redis: Redis, keys: Keys, ids: list[str]) -> None:
    """One outstanding lease a prompt, and the update that ends it."""
    await redis.hset(keys.clock, mapping={str(version): repr(version / 20) for version in range(10)})
    await redis.hset(keys.ledger, "train:leased", len(ids))
    for start in range(0, len(ids), 5000):
        part = ids[start : start + 5000]
        numbers = [f"train:0123abcd:{start + i + 1}" for i in range(len(part))]
        records = {n: OpenLease(one, 0.5, 4, 1.7e9).pack() for n, one in zip(numbers, part, strict=True)}
        await redis.hset(keys.outstanding("train"), mapping=records)
        async with redis.pipeline(transaction=False) as pipe:
            for i, (number, one) in enumerate(zip(numbers, part, strict=True)):
                update = PosteriorUpdate(
                    lease_id=number, prompt_id=one, outcome="trained", reward=float(i % 2), version=i % 10
                )
                pipe.xadd(keys.posterior_updates, {"id": number, "m": encode(update)})
            await pipe.execute()


async def drain(store: Store, count: int) -> float:
    """Seconds in which the store's loop applies everything in its stream."""
    started = time.perf_counter()
    loop = asyncio.create_task(loops.follow_updates(store))
    while store.memory.ended["train"].get("trained", 0) < count:  # noqa: ASYNC110  the loop has no event for it
        await asyncio.sleep(0.005)
    seconds = time.perf_counter() - started
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    return seconds


async def redis_seconds(server: EmbeddedRedis, redis: Redis, done: Keys, ids: list[str], transactions: bool) -> float:
    """Seconds in which the same Redis takes the same commands and bytes, packed before the clock starts."""
    keys = Keys(f"{done.run}-alone-{transactions}")
    await seed_updates(redis, keys, ids)
    share = make_config(done.run, server.url).anchor_share
    requests = await update_commands(redis, keys, ids, done, ENTRIES_PER_SCRIPT, share)
    seconds = await seconds_of(server.socket, [together(one) for one in requests] if transactions else requests)
    assert await redis.hlen(keys.outstanding("train")) == 0
    assert await redis.xlen(keys.posterior_updates) == 1
    return seconds


async def measure_updates(server: EmbeddedRedis, count: int, repetitions: int) -> list[Figure]:
    """Updates through the stream, decoded, computed, committed, trimmed; and Redis' own rates beside it."""
    redis, rates, cpu_us = connect(server.url), [], []
    alone: dict[bool, list[float]] = {False: [], True: []}
    for repetition in range(repetitions):
        keys = Keys(f"updates-{repetition}")
        ids = await fill(redis, keys, count, texts=False)
        await seed_updates(redis, keys, ids)
        store = Store(make_config(keys.run, server.url), redis)
        await store._read_anew()
        cpu_started = time.process_time()
        rates.append(count / await drain(store, count))
        cpu_us.append((time.process_time() - cpu_started) / count * 1e6)
        assert store.memory.ended["train"]["trained"] == count
        for transactions, found in alone.items():
            found.append(count / await redis_seconds(server, redis, keys, ids, transactions))
        await redis.flushdb()
    await redis.aclose()
    rate, pipelined, multi = (statistics.median(one) for one in (rates, alone[False], alone[True]))
    what = "the same commands and bytes, packed before, sent raw and pipelined"
    return [
        Figure("updates_per_s", rate, "updates/s", f"{count} through the stream, appendfsync {server.fsync}"),
        Figure("update_cpu_us", statistics.median(cpu_us), "µs", "CPU time of the store's process an update"),
        Figure("redis_pipelined_per_s", pipelined, "updates/s", what),
        Figure("redis_transactions_per_s", multi, "updates/s", f"{what}, {ENTRIES_PER_SCRIPT} updates a MULTI"),
        Figure(
            "updates_vs_redis_ratio", rate / max(pipelined, multi), "ratio", "updates_per_s / the faster of the two"
        ),
    ]


LOAD = """
import asyncio, json, sys, time
import psutil
import benchmarks.value_store as bench
async def main(run, url):
    redis = bench.connect(url)
    store = bench.Store(bench.make_config(run, url), redis)
    await redis.ping()
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    await store._read_anew()
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, (psutil.Process().memory_info().rss - before) / len(store.memory.table)]))
    await redis.aclose()
asyncio.run(main(*sys.argv[1:]))
"""


async def measure_million(server: EmbeddedRedis, prompts: int, repetitions: int) -> list[Figure]:
    """Start-up, memory and a draw."""
    redis, keys = connect(server.url), Keys("million")
    await fill(redis, keys, prompts, texts=False)
    loads = []
    for _ in range(repetitions):
        command = [sys.executable, "-c", LOAD, keys.run, server.url]
        reply = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        loads.append(json.loads(reply.stdout))
    store = Store(make_config(keys.run, server.url), redis)
    await store._read_anew()
    draws = [draw_ms(store, store.memory) for _ in range(5 * repetitions)]
    memory = store.memory.table
    choice = []
    for _ in range(3 * repetitions):
        started = time.perf_counter()
        weight = np.sqrt(memory.alpha * memory.beta) / (memory.alpha + memory.beta) + 0.05
        store.rng.choice(len(weight), DRAW, replace=False, p=weight / weight.sum())
        choice.append((time.perf_counter() - started) * 1000)
    await redis.aclose()
    return [
        Figure("draw_1024_of_1m_ms", statistics.median(draws), "ms", f"{DRAW} of {prompts}, weights included"),
        Figure("numpy_choice_1024_of_1m_ms", statistics.median(choice), "ms", "Generator.choice without replacement"),
        Figure("startup_1m_s", statistics.median(one[0] for one in loads), "s", f"{prompts} prompts from Redis"),
        Figure("bytes_per_prompt", statistics.median(one[1] for one in loads), "bytes", "resident, without texts"),
    ]


def draw_ms(store: Store, memory: Memory) -> float:
    """One draw as training makes it."""
    started = time.perf_counter()
    weight = issuing.training_weights(memory, store.config.value_store, store.retention, store.rng)
    rows = sampler.draw(weight, DRAW, store.rng)
    assert len(rows) == DRAW
    return (time.perf_counter() - started) * 1000


async def measure_latency(server: EmbeddedRedis, prompts: int, seconds: float) -> list[Figure]:
    """REST of a store process of its own, by a bare client on this machine."""
    redis, keys = connect(server.url), Keys("rest")
    ids = await fill(redis, keys, prompts, texts=True)
    streams = ValueStoreStreams(redis, keys)
    await streams.take_over()
    await streams.commit(Change(state="paused"), 8)
    await redis.aclose()
    measured = await measure_rest(make_config(keys.run, server.url), ids, seconds)
    figures = []
    for (name, connections), latency in measured.items():
        figures += rest_figures(name, connections, latency, measured[FLOOR, connections], prompts)
    at_16 = measured["get", 16]
    figures.append(
        Figure("get_p99_over_p50_c16", at_16.p99_ms / at_16.p50_ms, "ratio", "get_c16_p99_ms / get_c16_p50_ms")
    )
    return figures


async def measure_import_and_export(server: EmbeddedRedis, prompts: int) -> list[Figure]:
    """A million prompts in and out over REST, with the store's memory at its peak."""
    config = make_config("exchange", server.url)
    async with running(config) as process:
        return await measure_exchange(f"http://127.0.0.1:{config.value_store.port}", process.pid, prompts)


def rest_figures(name: str, connections: int, latency: Latency, floor: Latency, prompts: int) -> list[Figure]:
    """Three figures of one kind of request, and how often longer than `FLOOR` it takes."""
    what = f"{connections} connections, {prompts} prompts"
    p50, p99 = (
        f"{a / b:.2f} × that of {FLOOR}" for a, b in ((latency.p50_ms, floor.p50_ms), (latency.p99_ms, floor.p99_ms))
    )
    return [
        Figure(f"{name}_c{connections}_p50_ms", latency.p50_ms, "ms", f"{p50}; {what}"),
        Figure(f"{name}_c{connections}_p99_ms", latency.p99_ms, "ms", f"{p99}; {what}"),
        Figure(f"{name}_c{connections}_per_s", latency.per_s, "requests/s", what),
    ]


def against_aim(figure: Figure) -> Figure:
    """With its ratio to its aim, where it has one."""
    aim = AIMS.get(figure.name)
    return (
        replace(figure, reference=f"{figure.value / aim:.2f} × its aim, {aim:,}; {figure.reference}") if aim else figure
    )


def measure(quick: bool) -> list[Figure]:
    """All figures, each part on a Redis of its own."""

    async def everything() -> list[Figure]:
        figures = []
        for part in (
            lambda server: measure_updates(server, 20_000 if quick else 100_000, 1 if quick else 3),
            lambda server: measure_million(server, 1_000_000, 1 if quick else 3),
            lambda server: measure_latency(server, 20_000 if quick else 100_000, 1.0 if quick else 5.0),
            lambda server: measure_import_and_export(server, 50_000 if quick else 1_000_000),
        ):
            with tempfile.TemporaryDirectory(prefix="ss-") as folder:
                server = EmbeddedRedis(Path(folder), fsync="always")
                server.start()
                try:
                    figures += map(against_aim, await part(server))
                finally:
                    server.stop()
        return figures

    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:  # the service's
        return runner.run(everything())


if __name__ == "__main__":
    harness.run("value_store", measure)
