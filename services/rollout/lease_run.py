"""What a replica does with one lease: run its episode, grade it, and end or move the lease, whatever happens."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from services.rollout.environments import Environment
from services.rollout.episode import Episode, Finished, NothingSampled, PromptTooLong, ToolRunner
from services.rollout.generation import Engine, EngineDead
from services.rollout.grader_threads import GradersHang
from services.rollout.graders import last_boxed
from services.rollout.metrics import Metrics
from services.rollout.pin_watch import PinWatch
from services.rollout.weights import WeightKeeper, WeightsHeld
from singlestream.config import RolloutConfig
from singlestream.contracts import FailReason, Progress, Trajectory
from singlestream.contracts.trajectory import MAX_ANSWER_CHARS
from singlestream.errors import DeadlineExceeded, SandboxError
from singlestream.streams import Held, LeaseConsumer, begun_later, persist

T = TypeVar("T")
log = logging.getLogger(__name__)

EMIT_DEADLINE_S = 600.0
"""A finished trajectory waits so long for Redis to come back."""

EnvironmentOf = Callable[[str], Environment]


class BadReward(Exception):
    """A grader returned something outside [0, 1]; lands in a dead letter under this name."""


async def reward_of(environment: Environment, finished: Finished) -> float:
    """The reward, in [0, 1]. Raises `BadReward` for any other, and whatever the grader raises."""
    reward = await environment.grade(finished.response)
    if not 0.0 <= reward <= 1.0:
        raise BadReward(f"{environment.name} returned {reward}; a reward is finite and in [0, 1]")
    return reward


@dataclass
class Running:
    """An episode in a slot, and, once it is ``sampled``, beside the slots until it is graded and emitted.

    Once it is ``ending``, its lease may be gone because of what it does itself. What an episode had ``reached`` when
    its engine died is kept.
    """

    held: Held
    reached: Progress | None = None
    sampled: bool = False
    ending: bool = False
    interrupt: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    lost: bool = False


class LeaseRunner:
    """Runs leases, one `run` for each.

    Args:
        consumer: this replica's side of the lease streams.
        engine: samples.
        weights: knows the loaded policy version.
        environment_of: environment by name; raises KeyError or ConfigError for one that is not known.
        tools_of: a fresh tool runner for one episode.
        tools_healthy: whether the sandbox gateway is well.
        settings: limits and time-outs.
        metrics: of this replica.
    """

    def __init__(
        self,
        consumer: LeaseConsumer,
        engine: Engine,
        weights: WeightKeeper,
        environment_of: EnvironmentOf,
        tools_of: Callable[[], ToolRunner],
        tools_healthy: Callable[[], Awaitable[bool]],
        settings: RolloutConfig,
        metrics: Metrics,
    ) -> None:
        self.name, self.consumer, self.engine, self.weights = consumer.consumer, consumer, engine, weights
        self.environment_of, self.tools_of, self.settings, self.metrics = environment_of, tools_of, settings, metrics
        self.tools_healthy, self.tools_down = tools_healthy, False
        self.pins = PinWatch(consumer, weights)
        self.stopping = asyncio.Event()
        """Set once the replica stops, by a dead engine too; Redis is then waited for less."""
        self.slot_free = asyncio.Event()
        """Set when an episode leaves its slot."""
        self._closing = asyncio.Lock()

    async def tools_are_back(self) -> bool:
        """Ask the gateway, after a fault, whether leases may be taken again."""
        if await self.tools_healthy():
            self.tools_down = False
            log.info("the sandbox gateway is healthy: taking leases again")
        return not self.tools_down

    async def run(self, running: Running) -> None:
        """Run one lease to its end, whatever that is.

        Raises:
            EngineDead: the lease has been put back, if Redis was there; the replica must end.
            GradersHang: the lease has failed; likewise.
            DeadlineExceeded: Redis stayed away, and the lease with it; others claim it after its time-out.
        """
        number = running.held.lease.lease_id
        try:
            await self._run(running)
        except EngineDead as error:
            log.error("lease %s: %s", number, error)
            self.stopping.set()  # first, or this replica takes the lease again
            try:
                await self._put_back(running, running.reached or running.held.progress, "engine", count_attempt=True)
            except DeadlineExceeded as away:  # Redis is away as well: the engine's death is what ends the replica
                log.error("lease %s stays with Redis until its time-out: %s", number, away)
            raise
        except GradersHang as error:
            log.error("%s", error)
            self.stopping.set()
            raise
        except DeadlineExceeded as error:
            log.error("lease %s: %s", number, error)
            await self._put_back(running, running.held.progress, "deadline", count_attempt=True)
        except Exception:  # the boundary of one lease: whatever else goes wrong is that lease's end
            log.exception("lease %s failed", number)
            await self._fail(running, "malformed", traceback.format_exc())

    async def _run(self, running: Running) -> None:
        lease = running.held.lease
        if self.stopping.is_set():  # the last take brought it, perhaps what a dead engine has just given back
            await self._put_back(running, running.held.progress, "stop", count_attempt=False)
            return
        try:
            environment = self.environment_of(lease.environment)
        except Exception as error:  # an unknown name, or a user's module that does not import
            await self._fail(running, "malformed", f"environment {lease.environment!r}: {error!r}")
            return
        if lease.attempts and environment.uses_sandbox and not await self.tools_healthy():
            # one outage must not use up a lease's attempts, one replica after the other
            self.tools_down = True
            await self._put_back(running, running.held.progress, "tool", count_attempt=False)
            return
        if not await self._policy_is_there(running):
            return
        lease = lease.model_copy(update={"progress": running.held.progress}) if lease.progress else lease
        episode = Episode(lease, environment, self.engine, self.tools_of(), self.settings, self.name, running.interrupt)
        try:
            outcome = await episode.run()
        except SandboxError as error:
            await self._tool_unavailable(running, episode.progress, error)
        except EngineDead:
            running.reached = episode.progress
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
                running.sampled = running.ending = True
                self.slot_free.set()  # the engine need not wait for the grader and Redis
                await self._behind_requests()
                await self._grade(running, environment, outcome)

    async def _behind_requests(self) -> None:
        """Let one sampled episode a pass of the event loop go on to its end.

        Many may end in one step of the engine, which then waits for new requests; those are made in the same loop and
        would stand behind all of the graders.
        """
        async with self._closing:
            await asyncio.sleep(0)

    async def _policy_is_there(self, running: Running) -> bool:
        """Whether the engine's weights are those that the lease asks for; False once the lease has been put back."""
        lease = running.held.lease
        if not self.pins.may_start(lease):
            await self.persist(self.pins.look, "reading the pin")
            if self.pins.pin is None or self.pins.pin.job != lease.job:
                await self._fail(running, "cancelled", f"job {lease.job} is no longer under way")
            else:
                await self._put_back(running, running.held.progress, "pin", count_attempt=False)
            return False
        if lease.pinned:
            return True
        if lease.purpose == "evaluate" and self.weights.holding:
            await self.persist(self.pins.look, "reading the pin")
            if self.pins.named:
                return True  # left over by a job that has ended: nobody waits for its policy
        if self.weights.serves(lease.version, lease.lineage):
            return True
        cause = "stop"
        try:
            if await unless(running.interrupt, self.weights.ensure(lease.version, lease.lineage)):
                return True
        except WeightsHeld:
            cause = "pin"
        await self._put_back(running, running.held.progress, cause, count_attempt=False)
        return False

    async def _grade(self, running: Running, environment: Environment, finished: Finished) -> None:
        try:
            reward = await reward_of(environment, finished)
        except Exception as error:  # a grader is the user's code: its fault is this trajectory's, and no one else's
            await self._fail(running, "grader_error", traceback.format_exc())
            if isinstance(error, GradersHang):
                raise
            return
        trajectory = make_trajectory(finished, reward)
        emitted = await self.persist(lambda: self.consumer.emit(running.held, trajectory), "emitting a trajectory")
        if emitted:
            self.metrics.observe(running.held.lease.purpose, trajectory)

    async def _tool_unavailable(self, running: Running, progress: Progress, error: SandboxError) -> None:
        """No fault of the sandbox becomes evidence: the lease goes back, and after its last attempt it fails."""
        self.tools_down = True
        attempts = running.held.lease.attempts + 1
        log.warning("lease %s: the sandbox failed (attempt %d): %s", running.held.lease.lease_id, attempts, error)
        if attempts >= self.settings.max_attempts:
            await self._fail(running, "tool_unavailable", f"{attempts} attempts; the last: {error!r}")
        else:
            await self._put_back(running, progress, "tool", count_attempt=True)

    async def _put_back(self, running: Running, progress: Progress | None, cause: str, count_attempt: bool) -> None:
        running.ending = True
        held = running.held
        if count_attempt and held.lease.attempts + 1 >= self.settings.max_attempts:
            await self._fail(running, "attempts", f"attempt {held.lease.attempts + 1}: put back because of: {cause}")
            return
        if progress is not None and len(progress.segments) < 2:
            progress = None
        asked_s = time.time()
        moved = await self.persist(
            lambda: self.consumer.hand_over(held, begun_later(progress, time.time() - asked_s), count_attempt),
            "handing a lease over",
        )
        if moved:
            self.metrics.handed_over.labels(cause).inc()

    async def _fail(self, running: Running, reason: FailReason, detail: str) -> None:
        running.ending = True
        log.error("lease %s ends as %s: %s", running.held.lease.lease_id, reason, detail.strip().splitlines()[-1])
        if await self.persist(lambda: self.consumer.fail(running.held, reason, detail), "failing a lease"):
            self.metrics.failed.labels(reason).inc()

    async def persist(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        """Repeat an idempotent call while Redis is away. Raises `DeadlineExceeded`."""
        deadline_s = self.settings.stop_timeout_s if self.stopping.is_set() else EMIT_DEADLINE_S
        return await persist(call, what, deadline_s, lambda _: self.metrics.redis_retries.labels("write").inc())


async def unless(interrupt: asyncio.Event, wait: Coroutine[Any, Any, Any]) -> bool:
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


def boxed_answer(finished: Finished) -> str | None:
    """What the model's last turn boxed last, cut to its bound."""
    answer = last_boxed(finished.response.last_turn)
    return None if answer is None else answer.strip()[:MAX_ANSWER_CHARS]


def make_trajectory(finished: Finished, reward: float) -> Trajectory:
    """The message that ends a lease."""
    lease = finished.lease
    return Trajectory(
        lease_id=lease.lease_id,
        prompt_id=lease.prompt_id,
        job=lease.job,
        segments=finished.segments,
        reward=reward,
        answer=boxed_answer(finished) if lease.job else None,
        v_hat=lease.v_hat,
        end_reason=finished.end_reason,
        turns=finished.turns,
        tool_calls=finished.tool_calls,
        attempts=lease.attempts + 1,
        started_at_s=finished.started_at_s,
        finished_at_s=time.time(),
    )
