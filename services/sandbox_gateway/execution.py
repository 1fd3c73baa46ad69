"""One run, from request to verdict: its deadlines and its output."""

from __future__ import annotations

import asyncio
import math
import os
import time

from services.sandbox_gateway.faults import SandboxFault
from services.sandbox_gateway.inside.messages import Program, Reply
from services.sandbox_gateway.jail import Jail
from services.sandbox_gateway.output import KILL_BYTES, HeadTail
from services.sandbox_gateway.verdict import Ending, KillReason, judge
from services.sandbox_gateway.zygote_process import ZygoteProcess
from singlestream.contracts.sandbox import ExecuteRequest, ExecuteResult, Usage

CPU_GRACE_S = 2
"""RLIMIT_CPU stands this far above the request's cpu_s, so that a run that just makes it is not cut off by rounding."""
KILL_DEADLINE_S = 10.0
"""A killed run is gone in milliseconds; on an overloaded machine in a second. Later than this, its jail is given up."""
READ_BYTES = 65_536
SHORT_OUTPUT_S = 0.01
"""Pipes hold the output of most runs to their end; those that last longer have it read as it comes."""
SHORT_RUN_S = 0.25
"""Longer runs go behind shorter ones, so that endless loops cost their neighbours little."""


class Execution:
    """A run. Make one, await :meth:`run` once; :meth:`kill` may be called meanwhile.

    Args:
        zygote: forks it.
        request: what to run.
        memory_mb: its memory in MiB.
        policy_version: goes into the result.
    """

    def __init__(self, zygote: ZygoteProcess, request: ExecuteRequest, memory_mb: int, policy_version: str) -> None:
        self._zygote = zygote
        self._request = request
        self._policy_version = policy_version
        self._program = Program(
            memory_bytes=memory_mb << 20,
            cpu_s=math.ceil(request.cpu_s) + CPU_GRACE_S,
            seed=-1 if request.seed is None else request.seed,
            echo=request.echo_last_expr,
            source=request.code.encode(),
        )
        self._streams = (HeadTail(request.max_output_bytes), HeadTail(request.max_output_bytes))
        self._jail: Jail | None = None
        self._kill_reason: KillReason | None = None
        self._kill_wanted = False
        self.kill_overshoot_s: float | None = None
        """Seconds from the kill at a time-out to the end of the run. None if it did not time out."""

    def kill(self, reason: KillReason | None = None) -> None:
        """End the run. Without a reason its outcome is of no interest to anyone (the caller has gone)."""
        self._kill_wanted = True
        self._kill_reason = self._kill_reason or reason
        if self._jail is not None:
            self._jail.kill()

    async def run(self, queue_s: float = 0.0) -> ExecuteResult:
        """Run it to its end.

        Args:
            queue_s: seconds waited before, for the result.

        Raises:
            SandboxFault: there is no outcome.
        """
        loop = asyncio.get_running_loop()
        with await self._zygote.spares.take(self._request.stdin) as jail:
            self._jail = jail
            if self._kill_wanted:
                jail.kill()
            started_s = time.monotonic()
            timers = (
                loop.call_later(self._request.timeout_s, self.kill, "timeout"),
                loop.call_later(SHORT_OUTPUT_S, self._read_as_it_comes, jail),
                loop.call_later(SHORT_RUN_S, jail.yield_to_short_runs),
            )
            try:
                await jail.start(self._program)
                reply = await self._wait_for_exit(jail, started_s)
                wall_s = time.monotonic() - started_s
                if os.WIFSIGNALED(reply.value) and not self._kill_wanted and jail.program_unread():
                    raise SandboxFault("the run was killed before it had its program")
                for fd, stream in zip(jail.outputs, self._streams, strict=True):
                    while self._read(fd, stream):
                        pass
                page = jail.report()
            finally:
                self._jail = None
                for timer in timers:
                    timer.cancel()
                for fd in jail.outputs:
                    loop.remove_reader(fd)
        return self._result(reply, page, wall_s, queue_s)

    def _read_as_it_comes(self, jail: Jail) -> None:
        for fd, stream in zip(jail.outputs, self._streams, strict=True):
            asyncio.get_running_loop().add_reader(fd, self._read, fd, stream)

    def _read(self, fd: int, stream: HeadTail) -> bool:
        """Take what a pipe holds; False if it holds nothing (now, or any more)."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(fd)
            return False
        stream.feed(data)
        if stream.total_bytes > KILL_BYTES:
            self.kill("output_limit")
        return True

    async def _wait_for_exit(self, jail: Jail, started_s: float) -> Reply:
        try:
            async with asyncio.timeout(self._request.timeout_s + KILL_DEADLINE_S):
                reply = await jail.exited
        except TimeoutError:
            self._zygote.kill()
            raise SandboxFault(f"a killed run was still there after {KILL_DEADLINE_S:.0f} s") from None
        if self._kill_reason == "timeout":
            self.kill_overshoot_s = max(0.0, time.monotonic() - started_s - self._request.timeout_s)
        return reply

    def _result(self, reply: Reply, page: bytes, wall_s: float, queue_s: float) -> ExecuteResult:
        ending = Ending(reply.value, self._kill_reason, reply.cpu_s, self._program.cpu_s, page)
        verdict = judge(ending)
        out, err = self._streams
        usage = Usage(wall_s=wall_s, cpu_s=reply.cpu_s, max_rss_mb=reply.max_rss_kb / 1024, queue_s=queue_s)
        return ExecuteResult(
            status=verdict.status,
            exit_code=verdict.exit_code,
            signal=verdict.signal,
            stdout=out.text(),
            stderr=err.text(),
            stdout_truncated=out.truncated,
            stderr_truncated=err.truncated,
            stdout_bytes=out.total_bytes,
            stderr_bytes=err.total_bytes,
            error=verdict.error,
            usage=usage,
            policy_version=self._policy_version,
        )
