"""What a Redis that cannot serve now means to whoever writes: waiting, with its own words as the cause."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import DeadlineExceeded
from singlestream.streams import LOST, connect, persist
from tests.streams.refusal import unable_to_save

SCRIPT = "return redis.call('INCR', KEYS[1])"


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        one = EmbeddedRedis(Path(folder), fsync="no")
        one.start()
        yield one
        one.stop()


async def test_a_redis_that_cannot_save_is_waited_for(server: EmbeddedRedis) -> None:
    async with connect(server.url) as redis, connect(server.url) as operator:
        scripted = redis.register_script(SCRIPT)
        await redis.script_load(SCRIPT)

        async def transaction() -> None:
            async with redis.pipeline(transaction=True) as pipe:
                pipe.incr("n").incr("n")
                await pipe.execute()

        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: redis.incr("n"),
            lambda: scripted(keys=["n"]),
            transaction,
        ]
        refusals: list[Exception] = []

        async def mended_after_two() -> int:
            if len(refusals) == 2:
                await operator.config_set("save", "")
            return int(await redis.incr("n"))

        async with unable_to_save(server, operator):
            for call in calls:
                with pytest.raises(LOST):
                    await call()
            with pytest.raises(DeadlineExceeded, match=r"Redis, for a test .*unable to persist to disk"):
                await persist(calls[0], "a test", 0.1)
            assert await persist(mended_after_two, "a test", 60.0, refusals.append) == 1
        assert len(refusals) == 2


async def test_a_read_only_redis_is_waited_for(server: EmbeddedRedis) -> None:
    async with connect(server.url) as redis:
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(LOST, match="read only"):
            await redis.incr("n")
