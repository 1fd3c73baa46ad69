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
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ResponseError

from services.rollout.generation import EngineDead
from services.rollout.grader_threads import GradersHang
from services.rollout.lease_run import LeaseRunner, Running, unless
from singlestream.contracts import Purpose
from singlestream.streams import LOST, Held

log = logging.getLogger(__name__)

TAKE_BLOCK_MS = 500
POLL_S = 0.05
REDIS_RETRY_S = 0.5
REPORT_S = 2.0
PROBE_S = 1.0
"""After a fault of the sandbox no lease is taken until the gateway is healthy again; it is asked this often."""


class RolloutWorker:
    """Takes leases and has them run on one engine.

    Args:
        runner: runs them.
        node: machine or container that may be marked as draining; all of its replicas then hand over and end.
    """

    def __init__(self, runner: LeaseRunner, node: str) -> None:
        self.runner, self.node = runner, node
        self.name, self.consumer, self.weights = runner.name, runner.consumer, runner.weights
        self.settings, self.metrics = runner.settings, runner.metrics
        self.running: dict[str, Running] = {}
        self.paused = False
        """Whether the operator has replicas take no leases; what runs goes on."""
        self._heeding = asyncio.Lock()
        self._stop, self._over = runner.stopping, asyncio.Event()
        """The stop is asked for; every episode has ended or been handed over."""
        self._dead: EngineDead | GradersHang | None = None
        self._beat_at_s, self._silent_at_s = time.monotonic(), -math.inf
        """When the leases were last kept alive, and when Redis was last away or this process stood still."""
        self.metrics.in_use.set_function(lambda: self._in_use)

    async def run(self) -> None:
        """Work until `stop` or until the node drains; then hand the unfinished episodes over and return.

        Raises:
            EngineDead: the engine is gone; the leases have been handed over, and the process must exit.
            GradersHang: likewise, for the threads that users' graders hold.
        """
        self.metrics.slots.set(self.settings.slots)
        self._beat_at_s = time.monotonic()
        work = [asyncio.create_task(loop) for loop in (self._take_loop(), self.weights.run(self._stop))]
        beside = [
            asyncio.create_task(self._every(seconds, what, call))
            for seconds, what, call in (
                (self.settings.lease_timeout_s / 4, "heartbeat", self._heartbeat),
                (self.settings.lease_timeout_s / 2, "claim", self._claim),
                (REPORT_S, "report", self._report),
            )
        ]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({stopping, *work, *beside}, return_when=asyncio.FIRST_COMPLETED)
            self._stop.set()
            await self._hand_over(work[0])
            await self._end_loops(work)
        finally:
            stopping.cancel()
            self._stop.set()
            self._over.set()
            try:
                await self._end_loops([*work, *beside])
            finally:
                await self._sign_off()
        if self._dead is not None:
            raise self._dead

    def stop(self) -> None:
        """Ask `run` to hand over and return. May be called more than once, from a signal handler too."""
        self._stop.set()

    async def _end_loops(self, tasks: list[asyncio.Task[None]]) -> None:
        """Let each loop see its end, then end the rest; raise the first loop's own error."""
        done, late = await asyncio.wait(tasks, timeout=self.settings.stop_timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, EngineDead):
                self._dead = self._dead or error
            elif error is not None:
                raise error

    # taking

    async def _take_loop(self) -> None:
        await self._persist(self.consumer.join, "joining the consumer group")
        await self._persist(self._report, "the first report")  # a node that drains takes nothing
        while not self._stop.is_set():
            free = self._free
            if free <= 0 or self.paused:
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
                await self._nap(REDIS_RETRY_S)  # it may answer, and refuse
                await self._persist(self.consumer.redis.ping, "taking leases")
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self._persist(self.consumer.join, "joining the consumer group again")

    async def _persist(self, call: Callable[[], Awaitable[Any]], what: str) -> None:
        """Wait for Redis, but no longer than until the stop. Raises `DeadlineExceeded`."""
        await unless(self._stop, self.runner.persist(call, what))

    @property
    def _in_use(self) -> int:
        return sum(not running.sampled for running in self.running.values())

    @property
    def _free(self) -> int:
        """Leases that may be taken: into free slots, while no more than twice the slots are held, graders included."""
        slots = self.settings.slots
        return min(slots - self._in_use, 2 * slots - len(self.running))

    async def _take(self, free: int) -> None:
        """Take what there is for the free slots, never more."""
        purposes = self._purposes()
        held = await self.consumer.take(purposes, free, TAKE_BLOCK_MS) if purposes else []
        for one in held:
            self._start(one)
            await asyncio.sleep(0)  # the first request reaches the engine before the last one is made
        if not held:
            await self._nap(POLL_S)

    def _purposes(self) -> list[Purpose]:
        """Purposes whose leases may be taken now, the first before the others.

        Training waits for a published policy; estimation and evaluation may run on the model folder's weights. While
        an evaluation is pinned, its replicas take nothing else, and the others take everything else.
        """
        if self.runner.pins.named or self.weights.holding:
            return ["evaluate"] if self.runner.pins.serves else []
        purposes: list[Purpose] = ["train"] if self.weights.published else []
        return [*purposes, "estimate"] if self.runner.pins.pin is not None else [*purposes, "estimate", "evaluate"]

    async def _nap(self, seconds: float) -> None:
        """Wait for a free slot, the stop, or the time."""
        self.runner.slot_free.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self.runner.slot_free, self._stop)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _start(self, held: Held) -> None:
        running = Running(held)
        if (earlier := self.running.get(held.lease.lease_id)) is not None and not earlier.ending:
            self._cancel_lost(earlier)
        self.running[held.lease.lease_id] = running
        running.task = asyncio.create_task(self._serve(running), name=held.lease.lease_id)
        running.task.add_done_callback(_log_unended)

    async def _serve(self, running: Running) -> None:
        """Give one lease its slot."""
        number = running.held.lease.lease_id
        try:
            await self.runner.run(running)
        except (EngineDead, GradersHang) as error:
            self._dead = self._dead or error
        except asyncio.CancelledError:
            if not running.lost:
                raise
        finally:
            if self.running.get(number) is running:
                del self.running[number]
            self.runner.slot_free.set()

    # the loops beside

    async def _every(self, seconds: float, what: str, call: Callable[[], Awaitable[None]]) -> None:
        """Call again and again until every episode is over; a missing Redis is waited for by the next call."""
        while not self._over.is_set():
            started = time.monotonic()
            try:
                await call()
            except LOST as error:
                self._silent_at_s = time.monotonic()
                self.metrics.redis_retries.labels(what).inc()
                log.warning("%s: Redis is away: %s", what, error)
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                log.warning("%s: the consumer group is not there yet", what)
            pause_s = max(0.1, seconds - (time.monotonic() - started))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), pause_s)

    async def _heartbeat(self) -> None:
        """Keep the leases alive, and cancel the episodes of those that are lost.

        One that ends is let be: it may just have given its lease up, and if not, its end changes nothing.
        """
        beating = dict(self.running)
        for number in await self.consumer.heartbeat([running.held for running in beating.values()]):
            if self.running.get(number) is beating[number] and not beating[number].ending:
                self._cancel_lost(beating[number])
        before_s, self._beat_at_s = self._beat_at_s, time.monotonic()
        if self._beat_at_s - before_s > self.settings.lease_timeout_s / 2:
            self._silent_at_s = self._beat_at_s

    def _cancel_lost(self, running: Running) -> None:
        log.warning("lease %s is no longer ours: its episode is cancelled", running.held.lease.lease_id)
        self.metrics.lost.inc()
        running.lost = True
        if running.task is not None:
            running.task.cancel()

    async def _claim(self) -> None:
        """Take over what silent replicas hold, but not just after being silent: living ones may have been so as well.

        They were if Redis was away, or if the machine stood still. A replica's own leases are then among the old ones.
        """
        most_s, now = self.settings.lease_timeout_s / 2, time.monotonic()
        if now - self._beat_at_s > most_s or now - self._silent_at_s < most_s:
            return
        moved = await self.consumer.claim_dead(self.settings.lease_timeout_s, self.settings.max_attempts)
        if moved:
            self.metrics.claimed.inc(moved)
            log.info("took %d leases from silent replicas", moved)

    async def _report(self) -> None:
        """See what the pin and the operator ask for, say how the replica is, and see whether its node drains."""
        await self.heed_operator()
        await self.runner.pins.look()
        await self.runner.pins.follow([running.held.lease for running in self.running.values()])
        keys = self.consumer.keys
        async with self.consumer.redis.pipeline(transaction=False) as pipe:
            pipe.hset(keys.replicas, self.name, json.dumps(self.report()))
            pipe.hexists(keys.draining, self.node)
            _, draining = await pipe.execute()
        if draining and not self._stop.is_set():
            log.info("node %s drains: replica %s hands over and ends", self.node, self.name)
            self.stop()

    async def heed_operator(self) -> None:
        """See whether leases are to be taken; one look after the other, so that the last one counts."""
        async with self._heeding:
            paused = bool(await self.consumer.redis.exists(self.consumer.keys.rollout_paused))
            if paused != self.paused:
                log.info("replica %s: leases are %s", self.name, "not taken: paused" if paused else "taken again")
            self.paused = paused

    def report(self) -> dict[str, Any]:
        """What the replica says of itself; version and lineage are its weights', ``at_s`` is Unix time."""
        version, lineage = self.weights.held
        return {
            "node": self.node,
            "slots": self.settings.slots,
            "in_use": self._in_use,
            "version": version,
            "lineage": lineage,
            "pinned": self.runner.pins.held_for,
            "paused": self.paused,
            "at_s": time.time(),
        }

    # the end

    async def _hand_over(self, taking: asyncio.Task[None]) -> None:
        """Have every episode put its lease back, also what the last take still brings; cancel what is late."""
        if self.running:
            log.info("handing %d unfinished episodes over", len(self.running))
        deadline_s = time.monotonic() + self.settings.stop_timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            for running in self.running.values():
                running.interrupt.set()
            unended = {one.task for one in self.running.values() if one.task is not None}
            if not taking.done():
                unended.add(taking)
            if not unended:
                return
            await asyncio.wait(unended, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        late = [one.task for one in self.running.values() if one.task is not None]
        for task in late:
            log.error("lease %s could not be handed over in time; others take it after its time-out", task.get_name())
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def _sign_off(self) -> None:
        with contextlib.suppress(*LOST):
            await self.consumer.redis.hdel(self.consumer.keys.replicas, self.name)


def _log_unended(task: asyncio.Task[None]) -> None:
    """A lease that could not even be put back stays with Redis; another replica claims it after the lease time-out."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("lease %s could not be ended: %s", task.get_name(), error)
