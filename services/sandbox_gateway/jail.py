"""A run before and while it has a program: a locked-down child of a zygote, and the gateway's ends of its descriptors.

A jail is opened ahead of its request where possible, and used once. What it is told, and what may be asked of it, is
all here; what becomes of it is :mod:`services.sandbox_gateway.execution`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from types import TracebackType
from typing import TYPE_CHECKING

from services.sandbox_gateway.descriptors import Descriptors, sealed_memory, shared_page
from services.sandbox_gateway.faults import SandboxFault, fault_of
from services.sandbox_gateway.inside.messages import LOCKED, REPORT_BYTES, Order, Program, Reply, read_report

if TYPE_CHECKING:
    from services.sandbox_gateway.zygote_process import ZygoteProcess

TMP_BYTES = 32 << 20
LOCK_DEADLINE_S = 10.0
"""A lock-down takes milliseconds; on an overloaded machine a second. Later than this, the zygote is given up."""
LONG_RUN_NICE = 15
"""Of runs that are no longer short; the lock-down starts them at 5, the gateway and the zygotes are at 0."""

_run_ids = itertools.count(1)


class Jail:
    """One run. Make it with :meth:`open`, and leave it as a context manager, which ends what is left of it."""

    exited: asyncio.Future[Reply]
    """Resolves to the run's end, or raises :class:`SandboxFault` if it was lost."""

    def __init__(self, owned: Descriptors, line: socket.socket) -> None:
        self.outputs: tuple[int, int] = (-1, -1)
        """Read ends of its stdout and stderr, non-blocking."""
        self._owned = owned
        self._line = line
        self._report = self._pidfd = -1
        self._undelivered = False

    @classmethod
    async def open(cls, zygote: ZygoteProcess, stdin: str = "") -> Jail:
        """Fork a child and wait until it is locked down.

        Args:
            zygote: forks it.
            stdin: its standard input; empty is end of file at once.

        Raises:
            SandboxFault: the zygote is gone or stuck, or a step of the lock-down failed.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        owned = Descriptors()
        jail = cls(owned, ours)
        try:
            with theirs, Descriptors() as passed:
                out, err = owned.pipe(passed), owned.pipe(passed)
                jail.outputs = out[0], err[0]
                jail._report = owned.own(shared_page("report", REPORT_BYTES))
                source = sealed_memory("stdin", stdin.encode()) if stdin else os.open(os.devnull, os.O_RDONLY)
                fds = [passed.own(source), out[1], err[1], jail._report, theirs.fileno()]
                jail.exited, pidfd = await zygote.fork(Order(next(_run_ids), TMP_BYTES), fds)
                jail._pidfd = owned.own(pidfd)
            await jail._wait_until_locked(zygote)
        except BaseException:
            jail.close()
            raise
        return jail

    async def _wait_until_locked(self, zygote: ZygoteProcess) -> None:
        try:
            async with asyncio.timeout(LOCK_DEADLINE_S):
                if await asyncio.get_running_loop().sock_recv(self._line, 1) == LOCKED:
                    return
                await self.exited
        except TimeoutError:
            zygote.kill()
            raise SandboxFault(f"a run was not locked down within {LOCK_DEADLINE_S:.0f} s") from None
        zygote.kill()
        why = str(read_report(self.report()).get("setup", ""))
        raise fault_of("the run could not be locked down", why)

    @property
    def usable(self) -> bool:
        """Whether it still waits for its program."""
        return not self.exited.done()

    async def start(self, program: Program) -> None:
        """Give it its program, once."""
        data = program.pack()
        try:
            sent = self._send(data)
            if sent < len(data):
                await asyncio.get_running_loop().sock_sendall(self._line, data[sent:])
            self._line.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):  # it has died
            self._undelivered = True

    def program_unread(self) -> bool:
        """Whether a jail that has ended had not taken its program from the line: then the snippet has no outcome.

        A snippet cannot bring this about, as it is compiled after the line was read to its end and closed.
        """
        try:
            return self._undelivered or self._line.recv(1) != b""
        except OSError:  # ECONNRESET is the kernel's word for "closed with data unread"
            return True

    def _send(self, data: bytes) -> int:
        try:
            return self._line.send(data)
        except BlockingIOError:
            return 0

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def yield_to_short_runs(self) -> None:
        """Let it have the processors only as far as shorter runs do not want them; all its threads, present and future.

        Its process group, which is its own, has the number of its process. Should that end and its number be taken in
        between, an innocent run gets slower, no more.
        """
        with contextlib.suppress(OSError):  # it has ended
            with open(f"/proc/self/fdinfo/{self._pidfd}") as facts:
                group = next(int(line.split()[1]) for line in facts if line.startswith("Pid:"))
            if group > 0:
                os.setpriority(os.PRIO_PGRP, group, LONG_RUN_NICE)

    def report(self) -> bytes:
        """The page on which the run may have left its uncaught exception: hostile bytes."""
        return os.pread(self._report, REPORT_BYTES, 0)

    def close(self) -> None:
        """End it and close everything; a second time does nothing."""
        self.kill()
        self._pidfd = -1
        self._line.close()
        self._owned.close_all()

    def __enter__(self) -> Jail:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Spares:
    """Jails opened ahead of their requests, so that a run need not wait for its own.

    Args:
        zygote: forks them.
        count: how many are kept.
    """

    def __init__(self, zygote: ZygoteProcess, count: int) -> None:
        self._zygote = zygote
        self._count = count
        self._kept = 0
        self._waiting: list[Jail] = []
        self._opening: set[asyncio.Task[None]] = set()

    async def take(self, stdin: str = "") -> Jail:
        """A jail that nobody else has; the caller closes it.

        Raises:
            SandboxFault: see :meth:`Jail.open`.
        """
        while self._waiting and not stdin:
            jail = self._waiting.pop(0)
            self._refill()
            if jail.usable:
                return jail
            jail.close()
        self._refill()
        return await Jail.open(self._zygote, stdin)

    async def fill(self) -> None:
        """Open them, and from now on replace those that are taken."""
        self._kept = self._count
        self._refill()
        await asyncio.gather(*self._opening)

    def close(self) -> None:
        """Let go of those that wait, and keep none from now on."""
        self._kept = 0
        for task in self._opening:
            task.cancel()
        while self._waiting:
            self._waiting.pop().close()

    def _refill(self) -> None:
        for _ in range(self._kept - len(self._waiting) - len(self._opening)):
            self._opening.add(asyncio.create_task(self._add(), name="open a spare jail"))

    async def _add(self) -> None:
        try:
            jail = await Jail.open(self._zygote)
        except SandboxFault:  # without a spare, requests open their own jails and meet the fault, if it lasts
            return
        finally:
            # Here and not when the task is seen to be done: a jail must not count twice, as opening and as waiting.
            self._opening.discard(asyncio.current_task())
        self._waiting.append(jail)
