"""One run, from order to verdict: its descriptors, its deadlines, its output."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import signal
import time
from typing import NamedTuple

from services.sandbox_gateway.descriptors import Descriptors, sealed_memory, shared_page
from services.sandbox_gateway.inside.messages import REPORT_BYTES, Order, Reply
from services.sandbox_gateway.output import KILL_BYTES, HeadTail
from services.sandbox_gateway.verdict import Ending, KillReason, judge, read_report
from services.sandbox_gateway.zygote_process import SandboxFault, ZygoteProcess
from singlestream.contracts.sandbox import ExecuteRequest, ExecuteResult, Usage

CPU_GRACE_S = 2
"""RLIMIT_CPU stands this far above the request's cpu_s, so that a run that just makes it is not cut off by rounding."""
TMP_BYTES = 32 << 20
KILL_DEADLINE_S = 10.0
"""A killed run is gone in milliseconds; on an overloaded machine in a second. Later than this, its jail is given up."""
READ_BYTES = 65_536

_run_ids = itertools.count(1)


class RunIO(NamedTuple):
    """A run's descriptors in the gateway."""

    report: int
    """The page on which it leaves its uncaught exception."""
    event: int
    """Tells that it was locked down."""
    pipes: tuple[int, int]
    """Read ends of its stdout and stderr."""
    passed: list[int]
    """What the zygote gets: code, stdin, stdout, stderr, report page, event."""


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
        self._order = Order(
            run_id=next(_run_ids),
            memory_bytes=memory_mb << 20,
            cpu_s=math.ceil(request.cpu_s) + CPU_GRACE_S,
            tmp_bytes=TMP_BYTES,
            seed=-1 if request.seed is None else request.seed,
            echo=request.echo_last_expr,
        )
        self._streams = (HeadTail(request.max_output_bytes), HeadTail(request.max_output_bytes))
        self._pidfd = -1
        self._kill_reason: KillReason | None = None
        self._kill_wanted = False
        self.kill_overshoot_s: float | None = None
        """Seconds from the kill at a time-out to the end of the run. None if it did not time out."""

    def kill(self, reason: KillReason | None = None) -> None:
        """End the run. Without a reason its outcome is of no interest to anyone (the caller has gone)."""
        self._kill_wanted = True
        self._kill_reason = self._kill_reason or reason
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def run(self, queue_s: float = 0.0) -> ExecuteResult:
        """Run it to its end.

        Args:
            queue_s: seconds waited before, for the result.

        Raises:
            SandboxFault: there is no outcome.
        """
        loop = asyncio.get_running_loop()
        with Descriptors() as owned:
            io = _open(self._request, owned)
            child, pidfd = await self._zygote.fork(self._order, io.passed)
            started_s = time.monotonic()
            self._pidfd = owned.own(pidfd)
            timer = loop.call_later(self._request.timeout_s, self.kill, "timeout")
            try:
                if self._kill_wanted:
                    self.kill()
                # The gateway's copies of the write ends: end of file comes when the run's own close.
                owned.close(io.passed[2])
                owned.close(io.passed[3])
                for fd, stream in zip(io.pipes, self._streams, strict=True):
                    loop.add_reader(fd, self._read, fd, stream)
                reply = await self._wait_for_exit(child.exited, started_s)
                wall_s = time.monotonic() - started_s
                for fd, stream in zip(io.pipes, self._streams, strict=True):
                    while self._read(fd, stream):
                        pass
                page = os.pread(io.report, REPORT_BYTES, 0)
                self._require_locked_down(io.event, page)
            finally:
                timer.cancel()
                for fd in io.pipes:
                    loop.remove_reader(fd)
                # Left by an exception, the run may still be there.
                self.kill()
                self._pidfd = -1
        return self._result(reply, page, wall_s, queue_s)

    def _require_locked_down(self, event_fd: int, page: bytes) -> None:
        """Tell a run that never came to its snippet (a fault) from one whose snippet failed (an outcome)."""
        try:
            os.eventfd_read(event_fd)
        except BlockingIOError:
            if not self._kill_wanted:
                self._zygote.kill()
                why = read_report(page).get("setup", "it ended before it could say why")
                raise SandboxFault(f"the run could not be locked down: {why}") from None

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

    async def _wait_for_exit(self, exited: asyncio.Future[Reply], started_s: float) -> Reply:
        done, _ = await asyncio.wait({exited}, timeout=self._request.timeout_s + KILL_DEADLINE_S)
        if not done:
            self._zygote.kill()
            raise SandboxFault(f"a killed run was still there after {KILL_DEADLINE_S:.0f} s")
        if self._kill_reason == "timeout":
            self.kill_overshoot_s = max(0.0, time.monotonic() - started_s - self._request.timeout_s)
        return exited.result()

    def _result(self, reply: Reply, page: bytes, wall_s: float, queue_s: float) -> ExecuteResult:
        ending = Ending(reply.value, self._kill_reason, reply.cpu_s, self._order.cpu_s, page)
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


def _open(request: ExecuteRequest, owned: Descriptors) -> RunIO:
    """Make a run's descriptors."""
    stdin = sealed_memory("stdin", request.stdin.encode()) if request.stdin else os.open("/dev/null", os.O_RDONLY)
    code, stdin = owned.own(sealed_memory("code", request.code.encode())), owned.own(stdin)
    report = owned.own(shared_page("report", REPORT_BYTES))
    event = owned.own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    (out_read, out_write), (err_read, err_write) = owned.pipe(), owned.pipe()
    return RunIO(report, event, (out_read, err_read), [code, stdin, out_write, err_write, report, event])
