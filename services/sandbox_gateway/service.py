"""The gateway without HTTP: admission, the choice of a zygote, one execution, and what is said when that fails."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable

from services.sandbox_gateway import policy
from services.sandbox_gateway.admission import Admission
from services.sandbox_gateway.execution import Execution
from services.sandbox_gateway.faults import SandboxFault
from services.sandbox_gateway.metrics import Metrics
from services.sandbox_gateway.pool import ZygotePool
from services.sandbox_gateway.problems import Problem
from services.sandbox_gateway.zygote_process import ZygoteProcess
from singlestream.config import SandboxGatewayConfig
from singlestream.contracts.sandbox import MAX_CODE_BYTES, MAX_STDIN_BYTES, ExecuteRequest, ExecuteResult

log = logging.getLogger("singlestream.sandbox")

DRAINING_RETRY_S = 2.0
"""A gateway that stops is replaced by its supervisor in about this time."""
RUN_ESTIMATE_S = 0.5
"""First guess of a run's length, for Retry-After, until runs have been seen."""


class SandboxService:
    """Takes requests and answers with an outcome or a :class:`Problem`.

    Args:
        config: the gateway's settings.
        slots: runs at a time, already resolved from the settings and the host.
        pool: started zygotes.
        metrics: where counts go.
    """

    def __init__(self, config: SandboxGatewayConfig, slots: int, pool: ZygotePool, metrics: Metrics) -> None:
        self._config = config
        self.pool = pool
        """The zygotes."""
        self.metrics = metrics
        """Counts."""
        self._admission = Admission(slots, slots * config.queue_per_slot)
        self._tickets = itertools.count(1)
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._mean_run_s = RUN_ESTIMATE_S
        self._draining = False
        self._policy_version = policy.policy_version()
        metrics.slots.set(slots)
        metrics.used_slots.set_function(lambda: self._admission.used_slots)
        metrics.queued.set_function(lambda: self._admission.waiting)
        metrics.ready.set_function(lambda: float(self.not_ready() is None))

    @property
    def running(self) -> int:
        """Requests that hold slots."""
        return self._admission.running

    def not_ready(self) -> Problem | None:
        """Why no request is taken; None if they are."""
        if self._draining:
            return Problem(503, "overloaded", "the gateway is stopping; another one takes over", DRAINING_RETRY_S)
        if "ready" not in self.pool.states.values():
            if self.pool.unfit:
                return Problem(503, "isolation_unavailable", self.pool.failure or "")
            trouble = f"; the last start failed: {self.pool.failure}" if self.pool.failure is not None else ""
            return Problem(503, "overloaded", f"the zygotes are starting{trouble}", 1.0)
        return None

    def drain(self) -> None:
        """Take no more requests, and send away those in the queue; runs in progress go on."""
        self._draining = True
        for ticket in self._admission.drop_waiting():
            self._turns[ticket].cancel()

    async def execute(self, request: ExecuteRequest, disconnected: asyncio.Future[None]) -> ExecuteResult:
        """Run a snippet.

        Args:
            request: what to run.
            disconnected: done as soon as nobody waits for the result any more; the run is then killed.

        Raises:
            Problem: there is no outcome.
        """
        weight = self._check(request)
        ticket = next(self._tickets)
        arrived_s = time.monotonic()
        try:
            await self._wait_for_turn(ticket, weight, disconnected)
            zygote = await self._pick(request, arrived_s)
            queue_s = time.monotonic() - arrived_s
            self.metrics.queue_s.observe(queue_s)
            memory_mb = request.memory_mb or self._config.memory_mb
            execution = Execution(zygote, request, memory_mb, self._policy_version)
            kill = _killer(execution)
            disconnected.add_done_callback(kill)
            try:
                result = await execution.run(queue_s)
            except SandboxFault as fault:
                raise Problem(500, "sandbox_error", f"{fault}; the request may be sent again") from fault
            finally:
                disconnected.remove_done_callback(kill)
            self._count(result, execution)
            return result
        finally:
            for started in self._admission.leave(ticket):
                self._turns[started].set_result(None)

    def _check(self, request: ExecuteRequest) -> int:
        """Refuse what cannot be run here; return the slots that it takes."""
        for name, text, bound in (("code", request.code, MAX_CODE_BYTES), ("stdin", request.stdin, MAX_STDIN_BYTES)):
            size = len(text.encode())
            if size > bound:
                raise Problem(413, "too_large", f"{name} has {size} bytes, the limit is {bound}")
        if request.timeout_s > self._config.max_timeout_s:
            raise Problem(
                422,
                "invalid_request",
                f"timeout_s is {request.timeout_s}, this gateway's limit is {self._config.max_timeout_s}",
            )
        weight = math.ceil((request.memory_mb or self._config.memory_mb) / self._config.memory_mb)
        if weight > self._admission.slots:
            most = self._admission.slots * self._config.memory_mb
            raise Problem(422, "invalid_request", f"memory_mb is {request.memory_mb}, this gateway has {most} in all")
        if (problem := self.not_ready()) is not None and (self._draining or problem.code == "isolation_unavailable"):
            raise problem
        return weight

    async def _wait_for_turn(self, ticket: int, weight: int, disconnected: asyncio.Future[None]) -> None:
        decision = self._admission.offer(ticket, weight)
        if decision == "refuse":
            raise Problem(
                429, "overloaded", f"{self._admission.waiting} requests are waiting already", self._retry_after_s()
            )
        if decision == "run":
            return
        turn = self._turns[ticket] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait(
                {turn, disconnected}, timeout=self._config.queue_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            del self._turns[ticket]
        if turn.cancelled():
            raise Problem(503, "overloaded", "the gateway is stopping; another one takes over", DRAINING_RETRY_S)
        if disconnected.done():
            raise Problem(499, "overloaded", "the caller went away")
        if not turn.done():
            raise Problem(
                504,
                "queue_timeout",
                f"no slot became free within {self._config.queue_timeout_s:g} s",
                self._retry_after_s(),
            )

    async def _pick(self, request: ExecuteRequest, arrived_s: float) -> ZygoteProcess:
        left_s = self._config.queue_timeout_s - (time.monotonic() - arrived_s)
        try:
            return await self.pool.pick(request.code, max(0.01, left_s))
        except TimeoutError:
            why = self.pool.failure or "none has come up"
            raise Problem(
                504, "queue_timeout", f"no zygote was ready within {self._config.queue_timeout_s:g} s: {why}", 1.0
            ) from None

    def _retry_after_s(self) -> float:
        """When the queue will have moved: its length times the usual run, over the slots."""
        return min(30.0, self._mean_run_s * (self._admission.waiting + 1) / self._admission.slots)

    def _count(self, result: ExecuteResult, execution: Execution) -> None:
        self.metrics.runs.labels(result.status).inc()
        self.metrics.run_s.observe(result.usage.wall_s)
        for stream, cut in (("stdout", result.stdout_truncated), ("stderr", result.stderr_truncated)):
            self.metrics.truncated.labels(stream).inc(cut)
        if execution.kill_overshoot_s is not None:
            self.metrics.kill_overshoot_s.observe(execution.kill_overshoot_s)
        self._mean_run_s += 0.05 * (result.usage.wall_s - self._mean_run_s)


def _killer(execution: Execution) -> Callable[[asyncio.Future[None]], None]:
    """A callback that kills a run nobody waits for."""
    return lambda _: execution.kill()
