"""The zygote: a warm Python inside bubblewrap that forks one child per run.

It holds two capabilities, in its own user namespace, for one purpose: fresh pid and mount namespaces per run. It reads
fixed-size orders, never text. It has one thread, so a fork copies a quiet process.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import NamedTuple

from . import lockdown, snippet, warmup
from .messages import EXITED, LOCKED, ORDER_FDS, READY, REFUSED, REPORT_BYTES, STARTED, Order, Program, Reply

INIT_STACK_BYTES = 16 << 10
MADV_COLLAPSE = 25
HUGE_PAGE_BYTES = 2 << 20
SETUP_FAILED_EXIT = 125

_libc = lockdown.libc
_libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PAUSE = ctypes.cast(_libc.pause, ctypes.c_void_p)


class Init(NamedTuple):
    """The first process of a run's pid namespace, and the keeper of its mounts."""

    pid: int
    pidfd: int
    stack: ctypes.Array[ctypes.c_char]
    """Must outlive the process."""


class Live(NamedTuple):
    """A run in progress, as the zygote remembers it."""

    run_id: int
    pid: int
    init: Init


class Zygote:
    """Forks and reaps runs.

    Args:
        control: SEQPACKET socket to the gateway.
        proc_fd: directory descriptor of /proc.
        bpf: the compiled seccomp filter.
    """

    def __init__(self, control: socket.socket, proc_fd: int, bpf: bytes) -> None:
        self._control = control
        self._proc_fd = proc_fd
        self._program, self._program_buffer = lockdown.compile_program(bpf)
        self._own_pid_ns = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc_fd)
        self._base_bytes = 0
        self._live: dict[int, Live] = {}
        self._ending: dict[int, Init] = {}
        self._poll = select.epoll()
        self._poll.register(control, select.EPOLLIN)

    def serve(self) -> None:
        """Announce readiness and work until the gateway closes the socket."""
        pages_total, pages_resident = (int(n) for n in self._read_proc("statm").split()[:2])
        self._base_bytes = pages_total * os.sysconf("SC_PAGE_SIZE")
        self._control.send(Reply(READY, 0, pages_resident * os.sysconf("SC_PAGE_SIZE")).pack())
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._live:
                    self._reap(fd)
                elif fd in self._ending:
                    self._finish(fd)
                elif fd == self._control.fileno() and not self._take_order():
                    return

    def _read_proc(self, name: str) -> str:
        with open(os.open(f"self/{name}", os.O_RDONLY, dir_fd=self._proc_fd)) as file:
            return file.read()

    def _take_order(self) -> bool:
        """Handle one order; False when the gateway has gone."""
        record, ancillary, _, _ = self._control.recvmsg(1024, socket.CMSG_SPACE(ORDER_FDS * 4))
        if not record:
            return False
        fds = array.array("i")
        for _level, _kind, data in ancillary:
            fds.frombytes(data)
        order = Order.unpack(record)
        try:
            self._start(order, list(fds))
        except OSError as error:
            self._control.send(Reply(REFUSED, order.run_id, error.errno or 0).pack())
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _start(self, order: Order, fds: list[int]) -> None:
        init = self._new_namespaces()
        try:
            pid = os.fork()
        except OSError:
            _end_now(init)
            raise
        if pid == 0:
            self._become_run(order, fds, init)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _end_now(init)
            raise
        self._live[pidfd] = Live(order.run_id, pid, init)
        self._poll.register(pidfd, select.EPOLLIN)
        attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))]
        self._control.sendmsg([Reply(STARTED, order.run_id).pack()], attached)

    def _new_namespaces(self) -> Init:
        """Make a pid and a mount namespace whose first process only sleeps, and aim the next fork into the former.

        In it a run sees no process but itself, so it can signal and trace nobody. It is not process 1 itself, as the
        kernel shields that one from its own signals (SIGSTOP, abort). Ending process 1 ends all that might be in the
        namespace. It shares the zygote's memory and descriptors instead of copying them, so that it holds none of the
        run's open, and never runs anything but libc's pause().

        The mounts are its, and the run only joins them: taking a mount namespace down waits for every processor to pass
        through the scheduler, which beside busy neighbours takes tens of milliseconds. So that is part of the end of
        this process, which nobody waits for, and not of the run's.
        """
        lockdown.join(self._own_pid_ns, lockdown.CLONE_NEWPID, "setns back to the zygote's pid namespace")
        stack = ctypes.create_string_buffer(INIT_STACK_BYTES)
        top = (ctypes.addressof(stack) + INIT_STACK_BYTES) & ~0xF
        namespaces = lockdown.CLONE_NEWPID | lockdown.CLONE_NEWNS
        flags = namespaces | lockdown.CLONE_VM | lockdown.CLONE_FILES | signal.SIGCHLD
        init_pid = _libc.clone(_PAUSE, top, flags, None)
        lockdown.check(init_pid, "clone a pid namespace")
        init_fd = -1
        try:
            init_fd = os.pidfd_open(init_pid)
            lockdown.join(init_fd, lockdown.CLONE_NEWPID, "setns into the run's pid namespace")
        except OSError:
            _end_now(Init(init_pid, init_fd, stack))
            raise
        return Init(init_pid, init_fd, stack)

    def _reap(self, pidfd: int) -> None:
        """A run has ended, its threads with it: end its namespace, and tell its status."""
        run = self._live.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(run.pid, 0)
        # Before the answer: with its first process the kernel ends all that might be in a namespace, though a run can
        # start nothing that outlives it.
        os.kill(run.init.pid, signal.SIGKILL)
        self._control.send(Reply(EXITED, run.run_id, status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss).pack())
        self._ending[run.init.pidfd] = run.init
        self._poll.register(run.init.pidfd, select.EPOLLIN)

    def _finish(self, init_fd: int) -> None:
        """A run's namespace is gone."""
        init = self._ending.pop(init_fd)
        self._poll.unregister(init_fd)
        os.close(init_fd)
        os.waitpid(init.pid, 0)

    def _become_run(self, order: Order, fds: list[int], init: Init) -> None:
        """The child's whole life: locked down first, then its program, if it gets one. Never returns."""
        *streams, report_fd, line_fd = fds
        exit_code = SETUP_FAILED_EXIT
        report = None
        try:
            report = _libc.mmap(None, REPORT_BYTES, 3, 1, report_fd, 0)  # PROT_READ | PROT_WRITE, MAP_SHARED
            for target, fd in enumerate(streams):
                os.dup2(fd, target)
            lockdown.lock_down(init.pidfd, self._proc_fd, self._program, line_fd, order.tmp_bytes)
            module = snippet.prepare()
            program = _receive_program()
            lockdown.bound(self._base_bytes + program.memory_bytes, program.cpu_s)
            seed = None if program.seed < 0 else program.seed
            exit_code = snippet.run(module, program.source, echo=program.echo, seed=seed, report=report)
        except BaseException as error:
            if report is not None:
                snippet.write_report(report, {"setup": f"{type(error).__name__}: {error}"})
        finally:
            os._exit(exit_code)


def _receive_program() -> Program:
    """Say that the lock-down is over, wait for the program, and close the line.

    From here on the run is the snippet's: it has no way back to the gateway but its output, the report page and its
    exit status.
    """
    os.write(lockdown.LINE, LOCKED)
    parts = []
    while part := os.read(lockdown.LINE, 1 << 16):
        parts.append(part)
    os.close(lockdown.LINE)
    if not parts:  # a spare that is no longer needed
        os._exit(0)
    return Program.unpack(b"".join(parts))


def _end_now(init: Init) -> None:
    os.kill(init.pid, signal.SIGKILL)
    os.waitpid(init.pid, 0)
    if init.pidfd >= 0:
        os.close(init.pidfd)


def _require_one_thread(proc_fd: int, module: str) -> None:
    """A fork copies only the thread that forks: locks held by another would stay locked in every run."""
    tasks = os.open("self/task", os.O_RDONLY, dir_fd=proc_fd)
    threads = len(os.listdir(tasks))
    os.close(tasks)
    if threads != 1:
        raise SystemExit(f"preloaded module {module} starts threads ({threads} now), so nothing can be forked from it")


def collapse_to_huge_pages(maps: str) -> None:
    """Merge the warm heap into 2 MiB pages, which halves the time of a fork: it copies entries, not bytes.

    Only an optimisation: a kernel without MADV_COLLAPSE (before 6.1) answers EINVAL, and so does an empty range.
    """
    for line in maps.splitlines():
        span, permissions, _, _, inode = line.split()[:5]
        if permissions.startswith("rw") and inode == "0":
            low, high = (int(address, 16) for address in span.split("-"))
            first = -(-low // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
            for address in range(first, high - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
                _libc.madvise(address, HUGE_PAGE_BYTES, MADV_COLLAPSE)


def main() -> None:
    """Entry. Arguments: descriptors of the control socket, of /proc and of the filter; JSON list of modules to load."""
    control_fd, proc_fd, bpf_fd = (int(a) for a in sys.argv[1:4])
    preload: list[str] = json.loads(sys.argv[4])
    # Ctrl-C in a terminal is the gateway's to handle; Python's own handler would make process 1 of a run answer signals
    # from inside.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    bpf = os.pread(bpf_fd, 1 << 16, 0)
    os.close(bpf_fd)
    for name in warmup.STANDARD_LIBRARY:
        importlib.import_module(name)
    for name in preload:
        importlib.import_module(name)
        for extra in warmup.SUBMODULES.get(name, ()):
            with contextlib.suppress(ImportError):
                importlib.import_module(extra)
        exec(warmup.EXERCISE.get(name, ""), {})  # noqa: S102  our own constants
        _require_one_thread(proc_fd, name)
    zygote = Zygote(socket.socket(fileno=control_fd), proc_fd, bpf)
    collapse_to_huge_pages(zygote._read_proc("maps"))
    gc.collect()
    gc.freeze()  # a collection in a child would otherwise write to, and so copy, every page of the warm heap
    gc.disable()
    zygote.serve()
