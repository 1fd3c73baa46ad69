"""Runs whose outcome is known: a zygote that gets one of them wrong never sees a request.

They test the isolation itself, not its parts: each tries what it must not be able to do. Among them are plain programs,
so that a jail that refuses everything does not pass for a good one.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import signal
import socket
from dataclasses import dataclass
from textwrap import dedent

from services.sandbox_gateway.execution import Execution
from services.sandbox_gateway.faults import SandboxFault
from services.sandbox_gateway.zygote_process import ZygoteProcess
from singlestream.contracts.sandbox import MAX_CPU_S, MAX_MEMORY_MB, ExecuteRequest, ExecuteResult, RunStatus

_MEMORY_MB = 64
_HELD = "held\n"

_TRY_ALL = """
free = []
for code in ATTEMPTS:
    try:
        exec(code, globals())
    except BaseException:
        continue
    free.append(code)
print(free or "held")
"""

_NATIVE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    assert libc.syscall(*arguments) >= 0
"""
_VFORK = "call(58)" if platform.machine() == "x86_64" else "call(220, 17, 0, 0, 0, 0)"
_CLONE3 = "call(435, 0, 0)"

_THREADS = """
import threading
threading.stack_size(1 << 18)
stop = threading.Event()
n = 0
try:
    for n in range(100):
        threading.Thread(target=stop.wait, daemon=True).start()
except RuntimeError:
    print("held" if 8 <= n <= 32 else n)
"""

_IGNORE_EVERYTHING = """
import signal, time
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
time.sleep(60)
"""

_FILL_DISK = """
for n in range(4):
    with open(f"/tmp/large{n}", "wb") as file:
        file.write(bytes(15 << 20))
"""

_FILL_INODES = """
for n in range(2000):
    open(f"/tmp/small{n}", "w").close()
"""


@dataclass(frozen=True)
class Canary:
    """A run and what must come of it."""

    name: str
    code: str
    stdout: str = _HELD
    status: RunStatus = "ok"
    timeout_s: float = 20.0
    """Generous: a canary must not fail because the machine is busy."""
    memory_mb: int = _MEMORY_MB
    cpu_s: float = 10.0


def _attempts(*attempts: str, setup: str = "") -> str:
    """Code that prints ``held`` if each attempt raises, and else those that did not."""
    return f"{setup}\nATTEMPTS = {[dedent(a) for a in attempts]!r}\n{_TRY_ALL}"


def canaries(listener_port: int, secret_path: str) -> tuple[Canary, ...]:
    """The set.

    Args:
        listener_port: port of a live server of the gateway's on the host's loopback, which no run may reach.
        secret_path: a file that the gateway can read and no run may.
    """
    network = (
        f"socket.create_connection(('127.0.0.1', {listener_port}), 1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    )
    read = (f"open({secret_path!r})", "open('/proc/self/environ')", "open('/etc/passwd')", "open('/sys/kernel/notes')")
    write = (
        "open('/new', 'w')",
        "open('/usr/lib/new', 'w')",
        "open('/dev/new', 'w')",
        "open('/sandbox/inside/zygote.py', 'a')",
        _FILL_DISK,
        _FILL_INODES,
    )
    privileges = (
        "assert libc.unshare(0x10000000) == 0",
        "assert libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0",
        "assert libc.ptrace(0, 0, 0, 0) == 0",
        "assert libc.prctl(4, 1, 0, 0, 0) == 0 or libc.prctl(3, 0, 0, 0, 0) != 0  # dumped by the host's handler",
        "os.setuid(0)",
        "os.chroot('/tmp')",
    )
    return (
        Canary("sum", "print(sum(range(10)))", "45\n"),
        Canary("network", _attempts(*network, setup="import socket")),
        Canary("read", _attempts(*read)),
        Canary("write", _attempts(*write, setup="open('/tmp/mine', 'w').write('x')")),
        Canary("fork", _attempts("os.fork()", "os.execv('/usr/lib', ['x'])", _VFORK, _CLONE3, setup=_NATIVE)),
        Canary("privileges", _attempts(*privileges, setup=_NATIVE)),
        Canary("memory", f"bytearray({2 * _MEMORY_MB} << 20)", "", "memory_limit"),
        Canary("threads", _THREADS),
        Canary("largest", "print('held')", memory_mb=MAX_MEMORY_MB, cpu_s=MAX_CPU_S),
        Canary("alone", "import os\nprint('held' if os.getpid() == 2 and not os.listdir('/tmp') else 'not alone')"),
        Canary("kill", _IGNORE_EVERYTHING, "", "timeout", timeout_s=0.1),
        Canary("text", "print('ä' * 3)", "äää\n"),
    )


async def failing_canaries(zygote: ZygoteProcess, secret_path: str) -> list[str]:
    """Run the set on a zygote.

    Args:
        zygote: a warm one.
        secret_path: a file that this process can read.

    Returns:
        One line for each canary that came out wrong; empty if the isolation holds.

    Raises:
        SandboxFault: a run had no outcome, or none that tells of the isolation.
    """
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        chosen = canaries(listener.getsockname()[1], secret_path)
        results = await asyncio.gather(*(_run(zygote, canary) for canary in chosen))
        wrong = [line for canary, result in zip(chosen, results, strict=True) if (line := _judge(canary, result))]
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            wrong.append("network: a run reached a server on the host's loopback")
        return wrong


async def _run(zygote: ZygoteProcess, canary: Canary) -> ExecuteResult:
    request = ExecuteRequest(code=canary.code, timeout_s=canary.timeout_s, cpu_s=canary.cpu_s)
    for _ in range(2):
        try:
            result = await Execution(zygote, request, canary.memory_mb, "").run()
        except SandboxFault as fault:
            raise type(fault)(f"canary {canary.name}: {fault}") from fault
        if not _unlucky(canary, result):
            return result
    raise SandboxFault(f"canary {canary.name}: twice {result.status} by signal {result.signal}")


def _unlucky(canary: Canary, result: ExecuteResult) -> bool:
    """Whether an outcome tells of a busy machine, or of one short of memory, and not of its isolation."""
    return result.status != canary.status and (result.status == "timeout" or result.signal == signal.SIGKILL)


def _judge(canary: Canary, result: ExecuteResult) -> str | None:
    if (result.status, result.stdout) == (canary.status, canary.stdout):
        return None
    wanted = f"{canary.name}: expected {canary.status} and {canary.stdout!r}"
    return f"{wanted}, got {result.status} and {result.stdout[:300]!r}, stderr {result.stderr[-300:]!r}"
