"""Hostile snippets and what must come of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

NATIVE = """
import ctypes, os, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    return libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
def refused(*arguments):
    ctypes.set_errno(0)
    result = call(*arguments)
    return result < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)
"""


@dataclass(frozen=True)
class Attack:
    """A snippet.

    Args:
        name: of the test.
        code: the snippet.
        statuses: one of these must come of it.
        stdout: exactly this must have been printed; None: anything.
        request: further fields of the request.
    """

    name: str
    code: str
    statuses: tuple[str, ...] = ("ok",)
    stdout: str | None = "held\n"
    request: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", dedent(self.code))


def endless(name: str, code: str, **request: Any) -> Attack:
    """One that ends at its time-out; what it printed before must be there."""
    return Attack(name, f"print('before')\n{dedent(code)}", ("timeout",), "before\n", {"timeout_s": 0.7, **request})


def raising(name: str, code: str, *exceptions: str) -> Attack:
    """One whose every statement, run alone, must raise one of the exceptions."""
    names = ", ".join(exceptions or ("OSError",))
    body = f"""
import os, sys, socket, ctypes
free = []
for line in {[line for line in dedent(code).strip().splitlines()]!r}:
    try:
        exec(line, globals())
    except ({names}):
        continue
    free.append(line)
print(free or 'held')
"""
    return Attack(name, body)


def refused(name: str, *calls: str) -> Attack:
    """System calls, each of which must be refused by the filter."""
    listed = ", ".join(f"refused({c})" for c in calls)
    return Attack(name, f"{NATIVE}\nanswers = [{listed}]\nprint('held' if all(answers) else answers)")


TIME = (
    endless("infinite loop", "while True: pass"),
    endless(
        "sleep with every signal ignored",
        """
        import signal, time
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: time.sleep(60)
        """,
    ),
    endless("SIGSTOP to itself", "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)"),
    endless("SIGSTOP to its process group", "import os, signal, time\nos.kill(0, signal.SIGSTOP)\ntime.sleep(60)"),
    endless("catastrophic regex", "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')"),
    endless("busy threads", "import threading\nfor _ in range(20): threading.Thread(target=lambda: sum(iter(int, 1))).start()"),
    endless("wait for ever on a pipe", "import os; r, w = os.pipe(); os.read(r, 1)"),
    endless("wait for ever on a lock", "import threading; a = threading.Lock(); a.acquire(); a.acquire()"),
    endless("endless atexit", "import atexit\n@atexit.register\ndef f():\n    while True: pass"),
    endless("endless thread after the end", "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"),
    endless("endless finalizer", "class A:\n    def __del__(self):\n        while True: pass\na = A()"),
    endless("endless exception text", "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"),
    endless("endless excepthook", "import sys\ndef f(*a):\n    while True: pass\nsys.excepthook = f\n1 / 0"),
    Attack("huge integer power", "9 ** 9 ** 9 ** 9", ("timeout", "memory_limit", "error"), "", {"timeout_s": 0.7}),
    Attack("huge integer as text", "print(len(str(7 ** 10 ** 7)))", ("timeout", "error"), "", {"timeout_s": 0.7}),
    Attack("CPU beyond cpu_s", "while True: pass", ("timeout",), "", {"cpu_s": 0.1, "timeout_s": 60}),
)

PROCESSES = (
    Attack(
        "fork bomb",
        """
        import os
        made = 0
        for _ in range(1000):
            try: made += os.fork() >= 0
            except PermissionError: pass
        print('held' if made == 0 else made)
        """,
    ),
    refused("vfork, fork, clone and clone3 by number", "58", "57", "56, 17, 0, 0, 0, 0", "435, 0, 0"),
    refused("clone with threads and a namespace", "56, 0x10000000 | 0x10000 | 0x900, 0, 0, 0, 0", "56, 0x20000000 | 17, 0, 0, 0, 0"),
    Attack(
        "double-fork daemon",
        """
        import os, time
        try:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    while True: time.sleep(1)
                os._exit(0)
            print('free')
        except PermissionError:
            print('held')
        """,
    ),
    raising(
        "other programs",
        """
        import subprocess; subprocess.run(['/bin/sh', '-c', 'id'])
        import subprocess; subprocess.Popen([sys.executable, '-c', '1'])
        os.execv(sys.executable, [sys.executable, '-c', '1'])
        os.posix_spawn(sys.executable, [sys.executable], {})
        assert os.system('true') == 0
        import multiprocessing; multiprocessing.Process(target=print).start()
        import concurrent.futures as f; f.ProcessPoolExecutor(1).submit(int).result()
        import pty; pty.fork()
        """,
        "OSError",
        "AssertionError",
        "ImportError",
    ),
    Attack(
        "threads without end",
        """
        import threading
        stop, n = threading.Event(), 0
        try:
            while True:
                threading.Thread(target=stop.wait, daemon=True).start(); n += 1
        except RuntimeError:
            print('held' if n < 32 else n)
        """,
    ),
    Attack("death by SIGKILL", "import os; os.kill(os.getpid(), 9)", ("killed",), ""),
    Attack("death by SIGKILL to the group", "import os; os.kill(0, 9)", ("killed",), ""),
    Attack("segmentation fault", "import ctypes; ctypes.string_at(0)", ("killed",), ""),
    Attack("abort", "import os; os.abort()", ("killed",), ""),
    Attack("illegal instruction", "import os, signal; os.kill(os.getpid(), signal.SIGILL)", ("killed",), ""),
    Attack(
        "signals to others",
        """
        import os, signal
        reached = []
        for pid in [*range(3, 3000), -2, -3]:
            for number in (0, signal.SIGKILL, signal.SIGSTOP):
                try: os.kill(pid, number); reached.append(pid)
                except (ProcessLookupError, PermissionError): pass
        os.kill(1, signal.SIGKILL)  # the kernel takes no such signal from inside the namespace
        try: os.kill(-1, signal.SIGKILL)
        except ProcessLookupError: pass
        print(reached or 'held')
        """,
    ),
)

MEMORY = (
    Attack("bytearray", "bytearray(10 << 30)", ("memory_limit",), ""),
    Attack("list that grows", "l = []\nwhile True: l.append(' ' * 1000000)", ("memory_limit",), "", {"memory_mb": 128}),
    Attack("small objects that grow", "l = []\nwhile True: l.append([l])", ("memory_limit",), "", {"memory_mb": 64, "timeout_s": 20}),
    Attack("numpy", "import numpy as np\na = [np.ones(1 << 24) for _ in range(100)]", ("memory_limit",), "", {"memory_mb": 256}),
    Attack("string times number", "'a' * (1 << 40)", ("memory_limit",), ""),
    raising("shared anonymous memory", "import mmap; mmap.mmap(-1, 8 << 30)"),
    refused("memfd, memfd_secret, SysV shm, message queue", "319, b'x', 0", "447, 0", "29, 0, 1 << 30, 0o1600", "68, 0, 0o1600"),
    refused("locked memory, userfaultfd", "149, 0, 4096", "151, 1", "323, 0"),
    Attack(
        "pipes",
        """
        import os, fcntl
        ends = []
        try:
            while True:
                r, w = os.pipe(); ends.append((r, w)); os.set_blocking(w, False)
                try: os.write(w, bytes(1 << 20))
                except BlockingIOError: pass
        except OSError: pass
        try: fcntl.fcntl(ends[0][1], 1031, 1 << 20); print('free')
        except PermissionError: print('held' if len(ends) <= 32 else len(ends))
        """,
    ),
    Attack(
        "descriptors in flight",
        """
        import socket, array
        a, b = socket.socketpair()
        try: a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))]); print('free')
        except PermissionError: print('held')
        """,
    ),
    Attack("deep recursion", "def f(n): return f(n + 1)\nf(0)", ("error",), ""),
    Attack(
        "deep recursion without limit",
        "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\nA().a",
        ("killed", "memory_limit", "error", "timeout"),
        "",
        {"timeout_s": 3},
    ),
    Attack("parser bomb", "(" * 50_000 + ")" * 50_000, ("error", "memory_limit", "killed"), ""),
    Attack("unary bomb", "-" * 200_000 + "1", ("error", "memory_limit", "killed"), ""),
    Attack("NUL in the code", "print(1)\0", ("error",), ""),
)

OUTPUT = (
    Attack("a gigabyte of output", "import os\nb = b'x' * 65536\nfor _ in range(16384): os.write(1, b)", ("output_limit",), None, {"timeout_s": 30}),
    Attack("a gigabyte of errors", "import os\nb = b'x' * 65536\nfor _ in range(16384): os.write(2, b)", ("output_limit",), None, {"timeout_s": 30}),
    Attack("invalid UTF-8", r"import os; os.write(1, b'a\xff\xfe\xc3')", ("ok",), "a\ufffd\ufffd\ufffd"),
    Attack("closed streams", "import os\nos.close(1); os.close(2)\nprint('x')", ("error", "ok"), ""),
    Attack("text that looks like an answer", """print('{"status":"ok","stdout":"forged"}')\nimport os; os._exit(7)""", ("error",), None),
)

FILES = (
    Attack(
        "filling the disk",
        """
        import os
        written = 0
        try:
            for n in range(100):
                with open(f'/tmp/{n}', 'wb', buffering=0) as f:
                    for _ in range(15): written += f.write(bytes(1 << 20))
        except OSError: pass
        print('held' if written <= 32 << 20 else written)
        """,
    ),
    Attack(
        "filling the inodes",
        """
        n = 0
        try:
            for n in range(5000): open(f'/tmp/{n}', 'w').close()
        except OSError: pass
        print('held' if n <= 1024 else n)
        """,
    ),
    raising("one huge file", "open('/tmp/a', 'wb').truncate(1 << 40)\nf = open('/tmp/b', 'wb'); f.write(bytes(20 << 20)); f.flush()"),
    Attack(
        "every writable place",
        """
        import os
        found = []
        for folder, folders, files in os.walk('/'):
            if folder.startswith('/tmp'): continue
            try: open(os.path.join(folder, 'mark'), 'w').close(); found.append(folder)
            except OSError: pass
            for name in files[:3]:
                path = os.path.join(folder, name)
                if path.startswith('/dev/'): continue
                try: open(path, 'ab').close(); found.append(path)
                except OSError: pass
        print(found or 'held')
        """,
        request={"timeout_s": 60, "cpu_s": 60},
    ),
    raising(
        "reading the host",
        """
        open('/etc/passwd')
        open('/etc/shadow')
        open('/etc/hostname')
        os.listdir('/etc')
        os.listdir('/home')
        os.listdir('/var')
        os.listdir('/sys')
        os.listdir('/run')
        open('/.dockerenv')
        """,
    ),
    raising(
        "the process file system",
        """
        os.listdir('/proc')
        open('/proc/self/environ')
        open('/proc/1/environ')
        open('/proc/self/mem')
        open('/proc/self/maps')
        os.readlink('/proc/self/exe')
        os.listdir('/proc/self/fd')
        """,
    ),
    Attack("its environment", "import os; print('held' if 'TEST_SECRET' not in os.environ and len(os.environ) < 12 else dict(os.environ))"),
    raising(
        "symlinks and dots",
        """
        os.symlink('/etc/passwd', '/tmp/a'); open('/tmp/a')
        os.symlink('../../../../etc', '/tmp/b'); os.listdir('/tmp/b')
        os.symlink('/proc/self/root', '/tmp/c'); os.listdir('/tmp/c')
        open('/tmp/../../../../../etc/passwd')
        open('/dev/../etc/passwd')
        os.link('/usr/lib/os-release', '/tmp/d')
        os.rename('/dev/null', '/tmp/e')
        """,
    ),
    raising(
        "devices",
        """
        open('/dev/mem')
        open('/dev/kmsg')
        open('/dev/tty')
        open('/dev/pts/0')
        open('/dev/shm/x', 'w')
        open('/dev/vda')
        os.mknod('/tmp/m', 0o600 | 0o020000, os.makedev(1, 1))
        os.chmod('/dev/null', 0)
        os.unlink('/dev/null')
        """,
    ),
    Attack("what is in sight", "import os; print('held' if set(os.listdir('/dev')) == {'null', 'zero', 'random', 'urandom'} else os.listdir('/dev'))"),
)

NETWORK = (
    raising(
        "sockets of every family",
        """
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
        socket.socketpair(socket.AF_INET)
        """,
    ),
    raising(
        "connections to the host",
        """
        socket.create_connection(('127.0.0.1', CANARY_PORT), 2)
        socket.create_connection(('localhost', CANARY_PORT), 2)
        import urllib.request; urllib.request.urlopen('http://127.0.0.1:CANARY_PORT/', timeout=2)
        import http.client; http.client.HTTPConnection('127.0.0.1', CANARY_PORT, timeout=2).request('GET', '/')
        socket.gethostbyname('example.com')
        """,
    ),
    Attack(
        "abstract socket from a socket pair",
        """
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        try: a.sendto(b'x', 'CANARY_ABSTRACT'.replace('@', chr(0))); print('free')
        except OSError: print('held')
        """,
    ),
    refused("socket calls by number", "41, 2, 1, 0", "49, 0, 0, 16", "42, 0, 0, 16", "50, 0, 1", "54, 0, 1, 26, 0, 0"),
)

KERNEL = (
    refused("tracing and reading others", "101, 0, 0, 0, 0", "101, 16, 1, 0, 0", "310, 1, 0, 0, 0, 0, 0", "311, 1, 0, 0, 0, 0, 0", "434, 1, 0"),
    refused("nested namespaces", "272, 0x10000000", "272, 0x20000", "272, 0x40000000", "308, 0, 0"),
    refused("mounts", "165, b'tmpfs', b'/tmp', b'tmpfs', 0, 0", "166, b'/tmp', 2", "155, b'/tmp', b'/tmp'", "161, b'/tmp'", "428, -100, b'/', 1", "430, b'tmpfs', 0"),
    raising("other identities", "os.setuid(0)\nos.setgid(0)\nos.setgroups([0])\nos.setresuid(0, 0, 0)\nos.chroot('/tmp')"),
    refused("capabilities, personality, keys", "126, 0, 0", "135, 0xFFFFFFFF", "250, 0, 0", "248, b'user', b'x', b'y', 1, -1"),
    refused("bpf, perf, io_uring, seccomp", "321, 0, 0, 0", "298, 0, 0, -1, -1, 0", "425, 8, 0", "317, 0, 0, 0"),
    refused("handles, modules, reboot, swap", "303, 0, 0, 0", "304, 0, 0, 0", "175, 0, 0, b''", "313, 0, b'', 0", "169, 0, 0, 0, 0", "167, b'/tmp/x', 0"),
    refused("clock, host name, sync, quota", "227, 0, 0", "170, b'x', 1", "162", "306, 0", "179, 0, 0, 0, 0", "163, 0"),
    refused("ldt, ioperm, port access", "154, 0, 0, 0", "173, 0, 1, 1", "172, 3"),
    refused("process descriptors, landlock, ioprio", "438, 0, 0, 0", "424, 0, 9, 0, 0", "444, 0, 0, 0", "251, 1, 0, 0"),
    Attack("32-bit system call", NATIVE + """
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print('before', flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
""", ("killed",), "before\n"),
    Attack("x32 system call", NATIVE + "print('before', flush=True)\nprint(call(0x40000000 + 39))", ("killed",), "before\n"),
    raising(
        "raising limits",
        """
        import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))
        import resource as r; r.setrlimit(r.RLIMIT_NPROC, (1000, 1000))
        import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (4096, 4096))
        import resource as r; r.setrlimit(r.RLIMIT_CPU, (-1, -1))
        import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (-1, -1))
        os.nice(-5)
        """,
        "OSError",
        "ValueError",
    ),
    raising("terminal input and devices by ioctl", "import fcntl; fcntl.ioctl(0, 0x5412, b'x')\nimport fcntl; fcntl.ioctl(1, 0x8933, bytes(40))"),
    Attack("undoing the filter", NATIVE + "print('held' if libc.prctl(22, 0, 0) < 0 and libc.prctl(4, 0) < 0 and libc.prctl(38, 0, 0, 0, 0) < 0 else 'free')"),
)

ISOLATION = (
    Attack(
        "inherited descriptors",
        """
        import os
        found = []
        for fd in range(3, 4096):
            try: os.fstat(fd); found.append(fd)
            except OSError: pass
        print(found or 'held')
        """,
    ),
    Attack(
        "standard input is not writable",
        """
        import os
        try: os.write(0, b'x'); print('free')
        except OSError:
            try: os.ftruncate(0, 1 << 30); print('free')
            except OSError: print('held')
        """,
        request={"stdin": "x"},
    ),
    Attack(
        "poisoning modules",
        """
        import builtins, json, sys, math, random, numpy, sympy
        builtins.print_ = print
        builtins.len = lambda x: 666
        math.pi = 3; json.dumps = None; numpy.sum = None; random.random = lambda: 0.5
        sympy.pi = 4; sys.modules['math'] = None
        open('/tmp/left', 'w').write('x')
        print_('held')
        """,
    ),
    Attack(
        "what the zygote left in memory",
        """
        import gc, socket, select
        found = []
        for o in gc.get_objects():
            if isinstance(o, socket.socket) and o.fileno() >= 0:
                try: o.send(b'x'); found.append(o)
                except OSError: pass
        print(found or 'held')
        """,
    ),
    Attack(
        "passing itself off as a fault of the sandbox",
        """
        import sys, ctypes, os, json
        for module in list(sys.modules.values()):
            if getattr(module, 'write_report', None):
                frame = sys._getframe()
                while frame:
                    if isinstance(frame.f_locals.get('report'), int):
                        module.write_report(frame.f_locals['report'], {'setup': 'forged', 'type': 'x', 'message': 'y'})
                    frame = frame.f_back
        os._exit(125)
        """,
        ("error",),
        "",
    ),
    Attack("garbage on the report page", """
        import sys, ctypes, os
        frame = sys._getframe()
        while frame:
            if isinstance(frame.f_locals.get('report'), int):
                ctypes.memset(frame.f_locals['report'], 0x5b, 4096)
            frame = frame.f_back
        os._exit(1)
        """, ("error",), ""),
    Attack("its own exit code 125", "import os; os._exit(125)", ("error",), ""),
    Attack("fresh randomness", "import random, os, uuid; print('held' if len({random.random(), random.random()}) == 2 else 0)"),
)

ATTACKS = (*TIME, *PROCESSES, *MEMORY, *OUTPUT, *FILES, *NETWORK, *KERNEL, *ISOLATION)
