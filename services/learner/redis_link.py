"""Rank 0's connection to Redis: an event loop on its own thread, so that heartbeats go on while a step computes."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from singlestream.errors import DeadlineExceeded, Fenced
from singlestream.streams import LOST, Keys, LearnerStreams, connect, persist

log = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEAT_S = 2.0
JOIN_S = 10.0


@dataclass
class Status:
    """What the heartbeat says of the learner.

    Args:
        total_steps: of the run.
        step: optimizer steps taken.
        state: starting, waiting, training, publishing, stopped or finished.
        waiting_for: what a waiting learner waits for; empty otherwise.
        reward_mean: of the last batch; None before the first.
        lineage: start of the learner; 0 before it has taken over.
        version: announced last by this start; None before the first.
        at_s: Unix time of the heartbeat.
    """

    total_steps: int
    step: int = 0
    state: str = "starting"
    waiting_for: str = ""
    reward_mean: float | None = None
    lineage: int = 0
    version: int | None = None
    at_s: float = field(default=0.0)

    def to_json(self) -> str:
        """The heartbeat's text, stamped now."""
        return json.dumps({**asdict(self), "at_s": time.time()})


class RedisLink:
    """Runs coroutines on its thread; every call is repeated over lost connections until its deadline.

    Args:
        url: of Redis.
        keys: of the run.
        status: sent every `HEARTBEAT_S`.
        deadline_s: how long Redis may be away.

    Attributes:
        checks: asked before every call; what one raises, the call raises: rank 0 calls at least twice a second.
    """

    def __init__(self, url: str, keys: Keys, status: Status, deadline_s: float) -> None:
        self.status, self.deadline_s = status, deadline_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="redis", daemon=True)
        self._thread.start()
        self.redis = connect(url)
        self.streams = LearnerStreams(self.redis, keys)
        self._heartbeat: asyncio.Future[None] | None = None
        self.checks: list[Callable[[], None]] = []

    def call(self, make: Callable[[], Awaitable[T]], what: str) -> T:
        """Run an idempotent coroutine to its end.

        Args:
            make: makes it, anew for every attempt.
            what: named in the log and in errors.

        Raises:
            DeadlineExceeded: Redis was away for too long.
            Fenced: another learner has taken over.
        """
        if self._heartbeat is not None and self._heartbeat.done():
            self._heartbeat.result()  # a dead background task is a crash
        for check in self.checks:
            check()

        def warn(error: Exception) -> None:
            log.warning("redis is away (%s), trying again: %s", what, error)

        future = asyncio.run_coroutine_threadsafe(persist(make, what, self.deadline_s, warn), self._loop)
        return future.result()

    def start_heartbeat(self) -> None:
        """Begin to send the status; to be called after `LearnerStreams.take_over`."""

        async def start() -> asyncio.Future[None]:
            return asyncio.ensure_future(self._beat())

        self._heartbeat = asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    async def _beat(self) -> None:
        while True:
            try:
                await self.streams.heartbeat(self.status.to_json())
            except LOST as error:
                log.debug("heartbeat lost: %s", error)
            await asyncio.sleep(HEARTBEAT_S)

    def beat_now(self) -> None:
        """Send one heartbeat at once, where Redis answers within its deadline."""
        try:
            self.call(lambda: self.streams.heartbeat(self.status.to_json()), "a heartbeat")
        except (Fenced, DeadlineExceeded) as error:
            log.warning("last heartbeat not sent: %s", error)

    def close(self) -> None:
        """End the heartbeat, the connection and the thread."""

        async def end() -> None:
            if self._heartbeat is not None:
                self._heartbeat.cancel()
                await asyncio.gather(self._heartbeat, return_exceptions=True)
            await self.redis.aclose()

        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(JOIN_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(JOIN_S)
            self._loop.close()
