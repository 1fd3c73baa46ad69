"""The core of a replica: take leases while there are free slots, run their episodes, end every lease. Without Ray.

Each concern is a loop of its own: taking, heartbeats, claiming what dead replicas held, and the report. A loop that
fails ends the worker; an episode that fails ends its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from services.rollout.environments import Environment
from services.rollout.episode import Episode, Finished, NothingSampled, PromptTooLong, ToolRunner
from services.rollout.generation import Engine, EngineDead
from services.rollout.graders import Response
from services.rollout.metrics import Metrics
from services.rollout.weights import WeightKeeper
from singlestream.config import RolloutConfig
from singlestream.contracts import FailReason, Lease, Progress, Purpose, Trajectory
from singlestream.errors import DeadlineExceeded, SandboxError
from singlestream.streams import LOST, Held, LeaseConsumer, persist

T = TypeVar("T")
log = logging.getLogger(__name__)

TAKE_BLOCK_MS = 500
REPORT_S = 2.0
EMIT_DEADLINE_S = 600.0
"""A finished trajectory waits so long for Redis to come back."""
PROBE_S = 1.0
"""After a fault of the sandbox no lease is taken until the gateway is healthy again; it is asked this often."""

EnvironmentOf = Callable[[str], Environment]
GradeOf = Callable[[Environment, Response], Awaitable[float]]


class BadReward(Exception):
    """A grader returned something outside [0, 1]."""


@dataclass
class Running:
    """An episode in a slot."""

    held: Held
    interrupt: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    lost: bool = False


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
        self.name, self.consumer, self.engine, self.weights = name, consumer, engine, weights
        self.environment_of, self.tools_of, self.settings, self.metrics = environment_of, tools_of, settings, metrics
        self.running: dict[str, Running] = {}
        self._stop = asyncio.Event()
        self._slot_free = asyncio.Event()
        self._dead: EngineDead | None = None
        self.tools_healthy = tools_healthy
        self._tools_down = False
        self._turn = 0

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
        await self._persist(self.consumer.join, "joining the consumer group")
        while not self._stop.is_set():
            free = self.settings.slots - len(self.running)
            if free <= 0:
                await self._nap(0.25)
                continue
            if self._tools_down and not await self._tools_are_back():
                await self._nap(PROBE_S)
                continue
            purposes, count = self._next_purposes(free)
            try:
                for held in await self.consumer.take(purposes, count, TAKE_BLOCK_MS):
                    self._start(held)
            except LOST as error:
                self.metrics.redis_retries.labels("take").inc()
                log.warning("Redis is away (%s); taking leases again when it is back", error)
                await self._persist(self.consumer.redis.ping, "taking leases")
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self._persist(self.consumer.join, "joining the consumer group again")

    async def _tools_are_back(self) -> bool:
        if await self.tools_healthy():
            self._tools_down = False
            log.info("the sandbox gateway is healthy: taking leases again")
        return not self._tools_down

    def _next_purposes(self, free: int) -> tuple[Sequence[Purpose], int]:
        """From which streams to take, and how many of each, so that never more is taken than there are slots.

        Training waits for a published policy; estimation and evaluation may run on the model folder's weights.
        """
        wanted: list[Purpose] = (
            ["estimate", "evaluate"] if not self.weights.published else ["train", "estimate", "evaluate"]
        )
        if free >= len(wanted):
            return wanted, free // len(wanted)
        self._turn += 1
        return [wanted[self._turn % len(wanted)]], free

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

    # one lease

    async def _serve(self, running: Running) -> None:
        """Run one lease to its end, whatever that is."""
        lease = running.held.lease
        try:
            await self._run_lease(running)
        except EngineDead as error:
            log.error("lease %s: %s", lease.lease_id, error)
            self._dead = self._dead or error
            self._stop.set()
            await self._put_back(running, running.held.lease.progress, "engine", count_attempt=True)
        except asyncio.CancelledError:
            if not running.lost:
                raise
        except DeadlineExceeded as error:
            log.error("lease %s: %s", lease.lease_id, error)
            await self._put_back(running, lease.progress, "deadline", count_attempt=True)
        except Exception:  # the boundary of one lease: whatever else goes wrong is that lease's end
            log.exception("lease %s failed", lease.lease_id)
            await self._fail(running, "malformed", traceback.format_exc())
        finally:
            if self.running.get(lease.lease_id) is running:
                del self.running[lease.lease_id]
            self.metrics.in_use.set(len(self.running))
            self._slot_free.set()

    async def _run_lease(self, running: Running) -> None:
        lease = running.held.lease
        try:
            environment = self.environment_of(lease.environment)
        except Exception as error:  # an unknown name, or a user's module that does not import
            await self._fail(running, "malformed", f"environment {lease.environment!r}: {error!r}")
            return
        if lease.attempts and environment.stop and not await self.tools_healthy():
            # one outage must not use up a lease's attempts, one replica after the other
            self._tools_down = True
            await self._put_back(running, lease.progress, "tool", count_attempt=False)
            return
        if not await _unless(running.interrupt, self.weights.ensure(lease.version, lease.lineage)):
            await self._put_back(running, lease.progress, "stop", count_attempt=False)
            return
        episode = Episode(lease, environment, self.engine, self.tools_of(), self.settings, self.name, running.interrupt)
        try:
            outcome = await episode.run()
        except SandboxError as error:
            await self._tool_unavailable(running, episode.progress, error)
        except EngineDead:
            running.held = Held(lease.model_copy(update={"progress": episode.progress}), running.held.entry)
            raise
        except PromptTooLong as error:
            await self._fail(running, "malformed", str(error))
        except NothingSampled as error:
            log.warning("lease %s: %s", lease.lease_id, error)
            await self._put_back(running, None, "deadline", count_attempt=True)
        else:
            if isinstance(outcome, Progress):
                await self._put_back(running, outcome, "stop", count_attempt=False)
            else:
                await self._grade(running, environment, outcome)

    async def _grade(self, running: Running, environment: Environment, finished: Finished) -> None:
        try:
            reward = float(environment.grade(finished.response))
            if not 0.0 <= reward <= 1.0:
                raise BadReward(f"{environment.name} returned {reward}; a reward is finite and in [0, 1]")
        except Exception:  # a grader is the user's code: its fault is this trajectory's, and no one else's
            await self._fail(running, "grader_error", traceback.format_exc())
            return
        trajectory = make_trajectory(running.held.lease, finished, reward)
        emitted = await self._persist(lambda: self.consumer.emit(running.held, trajectory), "emitting a trajectory")
        if emitted:
            self.metrics.observe(running.held.lease.purpose, trajectory)

    async def _tool_unavailable(self, running: Running, progress: Progress, error: SandboxError) -> None:
        """No fault of the sandbox becomes evidence: the lease goes back, and after its last attempt it fails."""
        self._tools_down = True
        attempts = running.held.lease.attempts + 1
        log.warning("lease %s: the sandbox failed (attempt %d): %s", running.held.lease.lease_id, attempts, error)
        if attempts >= self.settings.max_attempts:
            await self._fail(running, "tool_unavailable", f"{attempts} attempts; the last: {error!r}")
        else:
            await self._put_back(running, progress, "tool", count_attempt=True)

    async def _put_back(self, running: Running, progress: Progress | None, cause: str, count_attempt: bool) -> None:
        held = running.held
        if count_attempt and held.lease.attempts + 1 >= self.settings.max_attempts:
            await self._fail(running, "attempts", f"attempt {held.lease.attempts + 1}: put back because of: {cause}")
            return
        if progress is not None and len(progress.segments) < 2:
            progress = None
        moved = await self._persist(
            lambda: self.consumer.hand_over(held, progress, count_attempt), "handing a lease over"
        )
        if moved:
            self.metrics.handed_over.labels(cause).inc()

    async def _fail(self, running: Running, reason: FailReason, detail: str) -> None:
        log.error("lease %s ends as %s: %s", running.held.lease.lease_id, reason, detail.strip().splitlines()[-1])
        if await self._persist(lambda: self.consumer.fail(running.held, reason, detail), "failing a lease"):
            self.metrics.failed.labels(reason).inc()

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

    async def _persist(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        deadline_s = self.settings.stop_timeout_s if self._stop.is_set() else EMIT_DEADLINE_S
        return await persist(call, what, deadline_s, lambda _: self.metrics.redis_retries.labels("write").inc())


async def _unless(interrupt: asyncio.Event, wait: Coroutine[Any, Any, None]) -> bool:
    """Wait, but no longer than until ``interrupt`` is set; False if it was. Passes the wait's error on."""
    tasks = [asyncio.create_task(wait), asyncio.create_task(_wait_for(interrupt))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            await tasks[0]
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


def _log_unended(task: asyncio.Task[None]) -> None:
    """A lease that could not even be put back stays with Redis; another replica claims it after the lease time-out."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("lease %s could not be ended: %s", task.get_name(), error)


def make_trajectory(lease: Lease, finished: Finished, reward: float) -> Trajectory:
    """The message that ends a lease."""
    return Trajectory(
        lease_id=lease.lease_id,
        prompt_id=lease.prompt_id,
        job=lease.job,
        segments=finished.segments,
        reward=reward,
        v_hat=lease.v_hat,
        end_reason=finished.end_reason,
        turns=finished.turns,
        tool_calls=finished.tool_calls,
        attempts=lease.attempts + 1,
        started_at_s=finished.started_at_s,
        finished_at_s=time.time(),
    )
