"""A real Redis that answers MISCONF: it could not save, as on a full disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from singlestream.embedded_redis import EmbeddedRedis

SAVE_DEADLINE_S = 60.0


@asynccontextmanager
async def unable_to_save(server: EmbeddedRedis, redis: Redis) -> AsyncIterator[None]:
    """Have the server's snapshot fail, so that it refuses every write until the block ends."""
    in_its_place = server.folder / "dump.rdb"
    in_its_place.mkdir()
    await redis.config_set("save", "3600 1000000")
    await redis.bgsave()
    started = time.monotonic()
    while (await redis.info("persistence"))["rdb_last_bgsave_status"] != "err":
        assert time.monotonic() - started < SAVE_DEADLINE_S, "waited for a snapshot to fail"
        await asyncio.sleep(0.02)
    yield
    await redis.config_set("save", "")
    in_its_place.rmdir()
