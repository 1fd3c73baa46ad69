"""How every service talks to Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis._parsers.base import BaseParser
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from singlestream.errors import DeadlineExceeded

log = logging.getLogger(__name__)

T = TypeVar("T")


class NotDurable(ResponseError):  # type: ignore[misc]  # redis is not followed
    """Redis takes no writes: it cannot save them (MISCONF; a full disk), or to too few replicas (NOREPLICAS)."""


# to the client these two are like any error of the caller's
BaseParser.EXCEPTION_CLASSES |= {"MISCONF": NotDurable, "NOREPLICAS": NotDurable}

LOST = (
    ConnectionError,  # also while the server loads its file
    TimeoutError,
    OSError,
    OutOfMemoryError,
    NotDurable,
    ReadOnlyError,
    TryAgainError,
    ClusterDownError,
    MasterDownError,
)
"""Errors that pass, and are waited for: the server is not there and the command's outcome not known, or it says why it
cannot serve now and has changed nothing."""

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
    """Repeat an **idempotent** call while Redis is away or refuses (`LOST`), with backoff from 0.05 s to 2 s.

    Args:
        call: makes the awaitable anew for every attempt.
        what: named in the error.
        deadline_s: seconds from the first attempt.
        on_retry: told of each failure, for logs and counters.

    Raises:
        DeadlineExceeded: it still was at the deadline; names the last error.
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


async def renew_file(redis: Redis) -> None:
    """Have Redis write its append-only file anew, once in the life of its process.

    A crash may end the file inside a transaction. Redis (all of 7) and Valkey before its pull request 4342 then cut
    the file behind the last whole command and append to the open MULTI, so the *next* restart would apply that part of
    a transaction. A file written from memory has no such tail. Without the right to ask for it: a warning.
    """
    about = await redis.info("persistence")
    if not about.get("aof_enabled") or about.get("aof_rewrites") or about.get("aof_rewrite_in_progress"):
        return
    try:
        await redis.execute_command("BGREWRITEAOF")
    except ResponseError as error:
        log.warning("Redis did not write its append-only file anew (%s); run redis-check-aof before it starts", error)
