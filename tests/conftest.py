"""A real Redis for every test that asks: one private server a session, a run name of its own a test.

No property test depends on speed: hypothesis' own limits on the time of an example are off.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis

from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        server = EmbeddedRedis(Path(folder), fsync="no")
        server.start()
        yield server
        server.stop()


@pytest.fixture
def keys() -> Keys:
    """Keys of a run that no other test uses, nor another session on this machine, whose weights lie beside these."""
    return Keys(f"t{os.getpid()}-{next(_numbers)}")


@pytest.fixture
async def redis(redis_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = connect(redis_server.url)
    yield client
    await client.aclose()
