"""Hostile snippets that try to use up time, processes, memory and output."""

# ruff: noqa: E501  a snippet is one line of text, however long

from __future__ import annotations

from tests.services.sandbox_gateway.attack import Attack, endless, raising, refused

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
    endless(
        "busy threads",
        "import threading\nfor _ in range(20): threading.Thread(target=lambda: sum(iter(int, 1))).start()",
    ),
    endless("wait for ever on a pipe", "import os; r, w = os.pipe(); os.read(r, 1)"),
    endless("wait for ever on a lock", "import threading; a = threading.Lock(); a.acquire(); a.acquire()"),
    endless("endless atexit", "import atexit\n@atexit.register\ndef f():\n    while True: pass"),
    endless(
        "endless thread after the end",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    ),
    endless("endless finalizer", "class A:\n    def __del__(self):\n        while True: pass\na = A()"),
    endless("endless exception text", "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"),
    endless("endless excepthook", "import sys\ndef f(*a):\n    while True: pass\nsys.excepthook = f\n1 / 0"),
    Attack("huge integer power", "9 ** 9 ** 9 ** 9", ("timeout", "memory_limit", "error"), "", {"timeout_s": 0.7}),
    Attack("huge integer as text", "print(len(str(7 ** 10 ** 7)))", ("timeout", "error"), "", {"timeout_s": 0.7}),
    Attack("CPU beyond cpu_s", "while True: pass", ("timeout",), "", {"cpu_s": 0.1, "timeout_s": 60}),
    Attack(
        "CPU beyond cpu_s, deaf",
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        ("timeout",),
        "",
        {"cpu_s": 0.1, "timeout_s": 60},
    ),
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
    refused(
        "clone with threads and a namespace",
        "56, 0x10000000 | 0x10000 | 0x900, 0, 0, 0, 0",
        "56, 0x20000000 | 17, 0, 0, 0, 0",
    ),
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
        for pid in [*range(3, 3000), -3, -9]:
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
    Attack(
        "small objects that grow",
        "l = []\nwhile True: l.append([l])",
        ("memory_limit",),
        "",
        {"memory_mb": 64, "timeout_s": 20},
    ),
    Attack(
        "small objects that grow, caught",
        "l = []\ntry:\n    while True: l.append([])\nexcept MemoryError:\n    del l; print('held')",
        request={"memory_mb": 64, "timeout_s": 20},
    ),
    Attack(
        "numpy",
        "import numpy as np\na = [np.ones(1 << 24) for _ in range(100)]",
        ("memory_limit",),
        "",
        {"memory_mb": 256},
    ),
    Attack("string times number", "'a' * (1 << 40)", ("memory_limit",), ""),
    raising("shared anonymous memory", "import mmap; mmap.mmap(-1, 8 << 30)"),
    refused(
        "memfd, memfd_secret, SysV shm, message queue",
        "319, b'x', 0",
        "447, 0",
        "29, 0, 1 << 30, 0o1600",
        "68, 0, 0o1600",
    ),
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
    Attack(
        "locks of files",
        """
        import fcntl
        file, fd = open('/tmp/a', 'w'), open('/dev/null')
        for n in range(15_000): fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * n); fcntl.lockf(fd, fcntl.LOCK_SH, 1, 2 * n)
        for lock in (lambda: fcntl.flock(file, fcntl.LOCK_EX), lambda: fcntl.fcntl(file, 37, bytes(32))):
            try: lock(); print('free')
            except PermissionError: pass
        print('held')
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
    Attack(
        "a gigabyte of output",
        "import os\nb = b'x' * 65536\nfor _ in range(16384): os.write(1, b)",
        ("output_limit",),
        None,
        {"timeout_s": 30},
    ),
    Attack(
        "a gigabyte of errors",
        "import os\nb = b'x' * 65536\nfor _ in range(16384): os.write(2, b)",
        ("output_limit",),
        None,
        {"timeout_s": 30},
    ),
    Attack("invalid UTF-8", r"import os; os.write(1, b'a\xff\xfe\xc3')", ("ok",), "a\ufffd\ufffd\ufffd"),
    Attack("closed streams", "import os\nos.close(1); os.close(2)\nprint('x')", ("error", "ok"), ""),
    Attack(
        "text that looks like an answer",
        """print('{"status":"ok","stdout":"forged"}')\nimport os; os._exit(7)""",
        ("error",),
        None,
    ),
)
