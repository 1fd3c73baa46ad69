"""The code tool of one episode: sends blocks to the sandbox gateway, bounds them, and records every call."""

from __future__ import annotations

import time
from typing import Protocol

from services.rollout.episode import ToolBudgetSpent, ToolRunner
from services.rollout.metrics import Metrics
from services.rollout.observations import truncate
from singlestream.clients.sandbox import observation
from singlestream.config import RolloutConfig
from singlestream.contracts import ToolCall
from singlestream.contracts.sandbox import MAX_CODE_BYTES, ExecuteRequest, ExecuteResult
from singlestream.errors import SandboxError

DEADLINE_FACTOR, DEADLINE_EXTRA_S = 2.0, 40.0
"""A call may take the code's own time, twice for a retry, and the gateway's longest queue."""


class Sandbox(Protocol):
    """The part of `singlestream.clients.sandbox.SandboxClient` that an episode uses."""

    async def execute(self, request: ExecuteRequest, deadline_s: float) -> ExecuteResult:
        """Run one snippet; retries what may be retried. Raises `SandboxError` for a fault of the sandbox."""
        ...


class SandboxTools(ToolRunner):
    """Runs one episode's code blocks.

    Args:
        sandbox: client of the gateway.
        limits: time-out, number of calls and length of output.
        metrics: counts calls and seconds.
    """

    def __init__(self, sandbox: Sandbox, limits: RolloutConfig, metrics: Metrics) -> None:
        self.sandbox, self.limits, self.metrics = sandbox, limits, metrics
        self.calls: list[ToolCall] = []
        self.turn = 0

    async def run(self, code: str) -> str:
        """See `environments.Tools`. Raises `SandboxError`, and `ToolBudgetSpent` beyond ``rollout.max_tool_calls``."""
        if len(self.calls) >= self.limits.max_tool_calls:
            raise ToolBudgetSpent
        started = time.monotonic()
        try:
            status, text = await self._execute(code)
        except SandboxError:
            self.metrics.tool_faults.inc()
            raise
        wall_s = time.monotonic() - started
        self.calls.append(ToolCall(turn=self.turn, status=status, wall_s=wall_s))
        self.metrics.tool_calls.labels(status).inc()
        self.metrics.tool_seconds.observe(wall_s)
        return truncate(text, self.limits.max_observation_chars, self.limits.truncate)

    async def _execute(self, code: str) -> tuple[str, str]:
        """(status, text). Code that is too long is the model's doing and told to it; all refusals are faults.

        A wrong address, or a gateway with tighter settings, refuses whatever the model wrote: no evidence about it.
        """
        if (size := len(code.encode())) > MAX_CODE_BYTES:
            return "error", f"Error: code has {size} bytes, the limit is {MAX_CODE_BYTES}"
        timeout_s = self.limits.tool_timeout_s
        request = ExecuteRequest(code=code, timeout_s=timeout_s, cpu_s=timeout_s)
        result = await self.sandbox.execute(request, deadline_s=DEADLINE_FACTOR * timeout_s + DEADLINE_EXTRA_S)
        return result.status, observation(result)
