"""The core of a replica: take leases while there are free slots, run their episodes, end every lease. Without Ray.

Each concern is a loop of its own: taking, heartbeats, claiming what dead replicas held, and the report. A loop that
fails ends the worker; an episode that fails ends its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from redis.exceptions import ResponseError

from services.rollout.episode import ToolRunner
from services.rollout.generation import Engine, EngineDead
from services.rollout.lease_run import EnvironmentOf, LeaseRunner, Running
from services.rollout.metrics import Metrics
from services.rollout.weights import WeightKeeper
from singlestream.config import RolloutConfig
from singlestream.contracts import Purpose
from singlestream.streams import LOST, Held, LeaseConsumer

log = logging.getLogger(__name__)

TAKE_BLOCK_MS = 500
POLL_S = 0.05
REPORT_S = 2.0
PROBE_S = 1.0
"""After a fault of the sandbox no lease is taken until the gateway is healthy again; it is asked this often."""


class RolloutWorker:
    """Runs leases on one engine.

    Args:
        name: of this replica, unique among all that ever ran.
        consumer: its side of the lease streams.
        engine: samples.
        weights: knows the loaded policy version.
        environment_of: environment by name; raises KeyError or ConfigError for one that is not known.
        tools_of: a fresh tool runner for one episode.
        tools_healthy: whether the sandbox gateway is well.
        settings: slots, limits and time-outs.
        metrics: of this replica.
    """

    def __init__(
        self,
        name: str,
        consumer: LeaseConsumer,
        engine: Engine,
        weights: WeightKeeper,
        environment_of: EnvironmentOf,
        tools_of: Callable[[], ToolRunner],
        tools_healthy: Callable[[], Awaitable[bool]],
        settings: RolloutConfig,
        metrics: Metrics,
    ) -> None:
        self.name, self.consumer, self.weights = name, consumer, weights
        self.settings, self.metrics = settings, metrics
        self.running: dict[str, Running] = {}
        self._stop = asyncio.Event()
        self._slot_free = asyncio.Event()
        self._dead: EngineDead | None = None
        self.runner = LeaseRunner(
            name,
            consumer,
            engine,
            weights,
            environment_of,
            tools_of,
            tools_healthy,
            settings,
            metrics,
            self._stop,
        )

    async def run(self) -> None:
        """Work until `stop`; then hand the unfinished episodes over and return.

        Raises:
            EngineDead: the engine is gone; the leases have been handed over, and the process must exit.
        """
        self.metrics.slots.set(self.settings.slots)
        loops: list[Coroutine[Any, Any, None]] = [
            self._take_loop(),
            self._every(self.settings.lease_timeout_s / 4, "heartbeat", self._heartbeat),
            self._every(self.settings.lease_timeout_s / 2, "claim", self._claim),
            self._every(REPORT_S, "report", self._report),
            self.weights.run(self._stop),
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            self._stop.set()
            # what the last take brings has to be put back too
            await asyncio.wait(tasks[:1], timeout=2 * TAKE_BLOCK_MS / 1000)
            await self._end_episodes()
        finally:
            stopping.cancel()
            await self._end_loops(tasks)
            await self._sign_off()
        if self._dead is not None:
            raise self._dead

    def stop(self) -> None:
        """Ask `run` to hand over and return. May be called more than once, from a signal handler too."""
        self._stop.set()

    async def _end_loops(self, tasks: list[asyncio.Task[None]]) -> None:
        """Let each loop see `stop`, then end the rest; raise the first loop's own error."""
        done, late = await asyncio.wait(tasks, timeout=self.settings.stop_timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            error = task.exception()
            if isinstance(error, EngineDead):
                self._dead = self._dead or error
            elif error is not None:
                raise error

    # taking

    async def _take_loop(self) -> None:
        await self.runner.persist(self.consumer.join, "joining the consumer group")
        while not self._stop.is_set():
            free = self.settings.slots - len(self.running)
            if free <= 0:
                await self._nap(0.25)
                continue
            if self.runner.tools_down and not await self.runner.tools_are_back():
                await self._nap(PROBE_S)
                continue
            try:
                await self._take(free)
            except LOST as error:
                self.metrics.redis_retries.labels("take").inc()
                log.warning("Redis is away (%s); taking leases again when it is back", error)
                await self.runner.persist(self.consumer.redis.ping, "taking leases")
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self.runner.persist(self.consumer.join, "joining the consumer group again")

    async def _take(self, free: int) -> None:
        """Take what there is for the free slots, never more.

        A read of several streams takes up to its count of each. With fewer slots than streams each is looked at
        in turn, and none is waited for, lest a lease waits in another.
        """
        rooms = self._rooms(free)
        if free >= len(rooms):
            count = min(free // len(rooms), *rooms.values())
            for held in await self.consumer.take(list(rooms), count, TAKE_BLOCK_MS):
                self._start(held)
            return
        before = free
        for purpose, room in rooms.items():
            if free:
                for held in await self.consumer.take([purpose], min(free, room), 1):
                    self._start(held)
                    free -= 1
        if free == before:
            await self._nap(POLL_S)

    def _rooms(self, free: int) -> dict[Purpose, int]:
        """Leases of each purpose that may be taken now; purposes without room are left out.

        Training waits for a published policy; estimation and evaluation may run on the model folder's weights.
        Evaluation gets at most its share.
        """
        rooms: dict[Purpose, int] = {"train": free} if self.weights.published else {}
        rooms["estimate"] = free
        evaluating = sum(running.held.lease.purpose == "evaluate" for running in self.running.values())
        share = math.ceil(self.settings.evaluation_share * self.settings.slots) - evaluating
        if share > 0:
            rooms["evaluate"] = share
        return rooms

    async def _nap(self, seconds: float) -> None:
        """Wait for a free slot, the stop, or the time."""
        self._slot_free.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._slot_free, self._stop)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _start(self, held: Held) -> None:
        running = Running(held)
        if (earlier := self.running.get(held.lease.lease_id)) is not None:
            self._cancel_lost(earlier)
        self.running[held.lease.lease_id] = running
        self.metrics.in_use.set(len(self.running))
        running.task = asyncio.create_task(self._serve(running), name=held.lease.lease_id)
        running.task.add_done_callback(_log_unended)

    async def _serve(self, running: Running) -> None:
        """Give one lease its slot."""
        number = running.held.lease.lease_id
        try:
            await self.runner.run(running)
        except EngineDead as error:
            self._dead = self._dead or error
        except asyncio.CancelledError:
            if not running.lost:
                raise
        finally:
            if self.running.get(number) is running:
                del self.running[number]
            self.metrics.in_use.set(len(self.running))
            self._slot_free.set()

    # the loops beside

    async def _every(self, seconds: float, what: str, call: Callable[[], Awaitable[None]]) -> None:
        """Call again and again until the worker stops; a missing Redis is waited for by the next call."""
        while not self._stop.is_set() or (what == "heartbeat" and self.running):
            started = time.monotonic()
            try:
                await call()
            except LOST as error:
                self.metrics.redis_retries.labels(what).inc()
                log.warning("%s: Redis is away: %s", what, error)
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                log.warning("%s: the consumer group is not there yet", what)
            pause_s = max(0.1, seconds - (time.monotonic() - started))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)
            if self._stop.is_set():
                await asyncio.sleep(0.1)

    async def _heartbeat(self) -> None:
        held = [running.held for running in self.running.values()]
        for number in await self.consumer.heartbeat(held) if held else []:
            running = self.running.get(number)
            if running is not None:
                self._cancel_lost(running)

    def _cancel_lost(self, running: Running) -> None:
        log.warning("lease %s is no longer ours: its episode is cancelled", running.held.lease.lease_id)
        self.metrics.lost.inc()
        running.lost = True
        if running.task is not None:
            running.task.cancel()

    async def _claim(self) -> None:
        moved = await self.consumer.claim_dead(self.settings.lease_timeout_s, self.settings.max_attempts)
        if moved:
            self.metrics.claimed.inc(moved)
            log.info("took %d leases from silent replicas", moved)

    async def _report(self) -> None:
        await self.consumer.redis.hset(self.consumer.keys.replicas, self.name, json.dumps(self.report()))

    def report(self) -> dict[str, Any]:
        """What the replica says of itself: slots, in_use, version, lineage (of its weights) and at_s (Unix time)."""
        version, lineage = self.weights.held
        return {
            "slots": self.settings.slots,
            "in_use": len(self.running),
            "version": version,
            "lineage": lineage,
            "at_s": time.time(),
        }

    # the end

    async def _end_episodes(self) -> None:
        """Interrupt every episode, so that it puts its lease back; cancel what does not by the deadline."""
        for running in self.running.values():
            running.interrupt.set()
        tasks = [running.task for running in self.running.values() if running.task is not None]
        if not tasks:
            return
        log.info("handing %d unfinished episodes over", len(tasks))
        _, late = await asyncio.wait(tasks, timeout=self.settings.stop_timeout_s)
        for task in late:
            log.error("lease %s could not be handed over in time; others take it after its time-out", task.get_name())
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sign_off(self) -> None:
        with contextlib.suppress(*LOST):
            await self.consumer.redis.hdel(self.consumer.keys.replicas, self.name)


def _log_unended(task: asyncio.Task[None]) -> None:
    """A lease that could not even be put back stays with Redis; another replica claims it after the lease time-out."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("lease %s could not be ended: %s", task.get_name(), error)
