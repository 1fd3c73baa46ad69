"""One zygote, as the gateway sees it: a bubblewrap process, a socket, and the runs in progress."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field

from services.sandbox_gateway.descriptors import sealed_memory
from services.sandbox_gateway.faults import SandboxFault, fault_of
from services.sandbox_gateway.inside.messages import EXITED, READY, REFUSED, STARTED, Order, Reply
from services.sandbox_gateway.jail import Spares
from services.sandbox_gateway.tiers import Tier
from services.sandbox_gateway.view import Interpreter, bubblewrap_command

START_DEADLINE_S = 60.0
"""A cold start reads hundreds of MB of libraries from disk."""
FORK_DEADLINE_S = 10.0
"""A fork takes milliseconds; a zygote that needs longer is stuck."""
STOP_DEADLINE_S = 5.0
STDERR_KEPT_BYTES = 4096


@dataclass
class Child:
    """A forked child."""

    started: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Resolves to its pidfd, which the receiver closes."""
    exited: asyncio.Future[Reply] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Resolves to the EXITED reply."""

    def fail(self, fault: SandboxFault) -> None:
        """It is lost."""
        for future in (self.started, self.exited):
            if not future.done():
                future.set_exception(fault)
                future.exception()  # whoever waits gets it; nobody waiting is no error


class ZygoteProcess:
    """A started zygote. Make one with :meth:`start`."""

    def __init__(
        self, tier: Tier, process: subprocess.Popen[bytes], control: socket.socket, stderr_fd: int, spares: int
    ) -> None:
        self.tier = tier
        self.spares = Spares(self, spares)
        """Jails that wait for a program."""
        self.runs_started = 0
        """Orders sent since its start."""
        self.started_at_s = asyncio.get_running_loop().time()
        """Loop time of its start."""
        self.gone = asyncio.Event()
        """Set once it can take no more orders, whatever the reason."""
        self._process = process
        self._control = control
        self._stderr_fd = stderr_fd
        self._stderr = bytearray()
        self._ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._children: dict[int, Child] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        loop = asyncio.get_running_loop()
        loop.add_reader(control.fileno(), self._on_replies)
        loop.add_reader(stderr_fd, self._on_stderr)

    @classmethod
    async def start(cls, tier: Tier, interpreter: Interpreter, bpf: bytes, spares: int) -> ZygoteProcess:
        """Start a zygote and wait until it is warm.

        Args:
            tier: what it imports.
            interpreter: its Python.
            bpf: the compiled seccomp filter.
            spares: jails that it will keep open; none is opened yet.

        Call it on the main thread: the kernel ends the jail when the *thread* that started it ends.

        Raises:
            SandboxFault: it did not come up; the text holds what it printed.
            IsolationUnavailable: likewise, for a reason that does not pass.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stderr_read, stderr_write = os.pipe()
        proc_fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        bpf_fd = sealed_memory("policy", bpf)
        try:
            ours.setblocking(False)
            os.set_blocking(stderr_read, False)
            command = bubblewrap_command(interpreter, theirs.fileno(), proc_fd, bpf_fd, tier.preload)
            # Takes a millisecond. A thread of a pool must not do it: --die-with-parent would watch that thread.
            process = subprocess.Popen(  # noqa: ASYNC220
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr_write,
                pass_fds=(theirs.fileno(), proc_fd, bpf_fd),
                env={"PATH": "/usr/bin:/bin"},
                cwd="/",
                # Ctrl-C and signals to the gateway's group are the gateway's to handle, so that it can drain.
                process_group=0,
            )
        except BaseException:
            ours.close()
            os.close(stderr_read)
            raise
        finally:
            theirs.close()
            for fd in (stderr_write, proc_fd, bpf_fd):
                os.close(fd)
        zygote = cls(tier, process, ours, stderr_read, spares)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await zygote._ready
        except TimeoutError:
            await zygote.stop()
            raise SandboxFault(f"the {tier.name} zygote was not warm after {START_DEADLINE_S:.0f} s") from None
        except BaseException:
            await zygote.stop()
            raise
        return zygote

    @property
    def live_runs(self) -> int:
        """Runs in progress."""
        return len(self._children)

    @property
    def pid(self) -> int:
        """Process id of its bubblewrap."""
        return self._process.pid

    async def drained(self) -> None:
        """Wait until no run is in progress."""
        await self._idle.wait()

    async def fork(self, order: Order, fds: list[int]) -> tuple[asyncio.Future[Reply], int]:
        """Fork a run.

        Args:
            order: the run's numbers.
            fds: its descriptors, in the order of :data:`ORDER_FDS`; they stay the caller's.

        Returns:
            What resolves to its end, and its pidfd, which the caller closes.

        Raises:
            SandboxFault: the zygote is gone, stuck, or could not fork.
        """
        if self.gone.is_set():
            raise SandboxFault(f"the {self.tier.name} zygote is gone")
        child = self._children[order.run_id] = Child()
        self._idle.clear()
        self.runs_started += 1
        attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            async with asyncio.timeout(FORK_DEADLINE_S):
                await self._send(order.pack(), attached)
                return child.exited, await child.started
        except TimeoutError:
            self.kill()
            raise SandboxFault(f"the {self.tier.name} zygote did not fork within {FORK_DEADLINE_S:.0f} s") from None
        except OSError as error:
            self.kill()
            raise SandboxFault(f"the {self.tier.name} zygote takes no orders: {error.strerror}") from error

    async def _send(self, record: bytes, attached: list[tuple[int, int, array.array[int]]]) -> None:
        for _ in range(int(FORK_DEADLINE_S / 0.002)):
            if self.gone.is_set():
                raise SandboxFault(f"the {self.tier.name} zygote is gone")
            try:
                self._control.sendmsg([record], attached)
                return
            except BlockingIOError:  # it holds hundreds of orders, so the zygote is far behind
                await asyncio.sleep(0.002)
        raise TimeoutError

    def kill(self) -> None:
        """End it and all its runs, now."""
        self.spares.close()
        if self._process.poll() is None:
            # Its group: bubblewrap's own child asks to die with it only a moment after it was made.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._lose(SandboxFault(f"the {self.tier.name} zygote was ended while the run was in progress"))

    async def stop(self) -> None:
        """End it, wait until bubblewrap is gone, and close everything. Runs in progress are lost."""
        self.kill()
        for _ in range(int(STOP_DEADLINE_S / 0.005)):
            if self._process.poll() is not None:
                break
            await asyncio.sleep(0.005)
        if self._stderr_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._stderr_fd)
            os.close(self._stderr_fd)
            self._stderr_fd = -1

    def said(self) -> str:
        """The last that it, or bubblewrap, printed to standard error."""
        return self._stderr.decode("utf-8", "replace").strip()

    def _on_stderr(self) -> None:
        try:
            data = os.read(self._stderr_fd, 65_536)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._stderr_fd)
        self._stderr = (self._stderr + data)[-STDERR_KEPT_BYTES:]

    def _on_replies(self) -> None:
        while not self.gone.is_set():
            try:
                record, ancillary, _, _ = self._control.recvmsg(256, socket.CMSG_SPACE(4))
            except BlockingIOError:
                return
            except OSError:
                record, ancillary = b"", []
            if not record:
                self._on_hangup()
                return
            fds = array.array("i")
            for _level, _kind, data in ancillary:
                fds.frombytes(data)
            self._on_reply(Reply.unpack(record), list(fds))

    def _on_reply(self, reply: Reply, fds: list[int]) -> None:
        child = self._children.get(reply.run_id)
        if reply.kind == READY and not self._ready.done():
            self._ready.set_result(reply.value)
        elif child is None:
            for fd in fds:
                os.close(fd)
        elif reply.kind == STARTED:
            if child.started.done():  # whoever ordered it has given up
                signal.pidfd_send_signal(fds[0], signal.SIGKILL)
                os.close(fds[0])
            else:
                child.started.set_result(fds[0])
        elif reply.kind == EXITED:
            self._forget(reply.run_id)
            if not child.exited.done():
                child.exited.set_result(reply)
        elif reply.kind == REFUSED:
            self._forget(reply.run_id)
            child.fail(fault_of(f"the {self.tier.name} zygote could not fork", os.strerror(reply.value)))

    def _forget(self, run_id: int) -> None:
        del self._children[run_id]
        if not self._children:
            self._idle.set()

    def _on_hangup(self) -> None:
        self._on_stderr_rest()
        said = self.said()
        self.kill()
        if not self._ready.done():
            self._ready.set_exception(fault_of("it ended", said))

    def _on_stderr_rest(self) -> None:
        """What it printed last may not have been read yet."""
        with contextlib.suppress(OSError):
            self._stderr = (self._stderr + os.read(self._stderr_fd, 65_536))[-STDERR_KEPT_BYTES:]

    def _lose(self, fault: SandboxFault) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        children, self._children = self._children, {}
        self._idle.set()
        for child in children.values():
            child.fail(fault)
