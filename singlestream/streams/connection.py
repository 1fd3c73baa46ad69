"""How every service talks to Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError

from singlestream.errors import DeadlineExceeded

T = TypeVar("T")

LOST = (ConnectionError, TimeoutError, BusyLoadingError, OSError)
"""Errors after which the command's outcome is not known, or the server is not there."""

SOCKET_TIMEOUT_S = 30.0
"""A reply later than this counts as lost; blocking reads ask for less."""


def connect(url: str) -> Redis:
    """A client without retries of its own: a write whose reply was lost must not be repeated unseen."""
    return Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=5.0,
        health_check_interval=0,
    )


async def persist(
    call: Callable[[], Awaitable[T]], what: str, deadline_s: float, on_retry: Callable[[Exception], None] | None = None
) -> T:
    """Repeat an **idempotent** call while Redis is away, with backoff from 0.05 s to 2 s.

    Args:
        call: makes the awaitable anew for every attempt.
        what: named in the error.
        deadline_s: seconds from the first attempt.
        on_retry: told of each failure, for logs and counters.

    Raises:
        DeadlineExceeded: Redis was still away at the deadline.
    """
    started, pause_s = time.monotonic(), 0.05
    while True:
        try:
            return await call()
        except LOST as error:
            waited = time.monotonic() - started
            if waited + pause_s > deadline_s:
                raise DeadlineExceeded(f"Redis, for {what} (last error: {error})", waited) from error
            if on_retry is not None:
                on_retry(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)


async def wait_for_redis(redis: Redis, deadline_s: float) -> None:
    """Wait until the server answers and has loaded its file. Raises `DeadlineExceeded`."""
    await persist(lambda: redis.ping(), "its first answer", deadline_s)
