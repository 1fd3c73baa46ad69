"""A run with a published policy, for workers with scripted engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from singlestream.streams import Keys
from tests.services.rollout.site import Site


@pytest.fixture
async def site(redis: Redis, keys: Keys, tmp_path: Path) -> Site:
    one = Site(redis, keys, tmp_path)
    await one.publish(0)
    return one
