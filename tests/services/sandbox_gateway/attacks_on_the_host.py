"""Hostile snippets against files, network, kernel and the isolation itself."""

# ruff: noqa: E501  a snippet is one line of text, however long

from __future__ import annotations

from tests.services.sandbox_gateway.attack import NATIVE, Attack, raising, refused

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
    raising(
        "one huge file",
        "open('/tmp/a', 'wb').truncate(1 << 40)\nf = open('/tmp/b', 'wb'); f.write(bytes(20 << 20)); f.flush()",
    ),
    Attack(
        "every writable place",
        """
        import os
        found = []
        for folder, folders, files in os.walk('/'):
            if folder.startswith('/tmp'): continue
            if folder.count('/') > 5: folders.clear()  # every mount lies above, and a package's insides are many
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
    raising(
        "a secret in the gateway's files",
        """
        open('SECRET_FILE')
        open('/proc/1/root' + 'SECRET_FILE')
        os.symlink('SECRET_FILE', '/tmp/a'); open('/tmp/a')
        open('/tmp/../..' + 'SECRET_FILE')
        """,
    ),
    Attack(
        "its environment",
        "import os; print('held' if 'TEST_SECRET' not in os.environ and len(os.environ) < 12 else dict(os.environ))",
    ),
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
    Attack(
        "what is in sight",
        "import os; print('held' if set(os.listdir('/dev')) == {'null', 'zero', 'random', 'urandom'} else os.listdir('/dev'))",
    ),
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
        socket.create_connection(('CANARY_HOST', CANARY_PORT), 2)
        socket.create_connection(('localhost', CANARY_PORT), 2)
        import urllib.request; urllib.request.urlopen('http://CANARY_HOST:CANARY_PORT/', timeout=2)
        import http.client; http.client.HTTPConnection('CANARY_HOST', CANARY_PORT, timeout=2).request('GET', '/')
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
    refused(
        "tracing and reading others",
        "101, 0, 0, 0, 0",
        "101, 16, 1, 0, 0",
        "310, 1, 0, 0, 0, 0, 0",
        "311, 1, 0, 0, 0, 0, 0",
        "434, 1, 0",
    ),
    refused("nested namespaces", "272, 0x10000000", "272, 0x20000", "272, 0x40000000", "308, 0, 0"),
    refused(
        "mounts",
        "165, b'tmpfs', b'/tmp', b'tmpfs', 0, 0",
        "166, b'/tmp', 2",
        "155, b'/tmp', b'/tmp'",
        "161, b'/tmp'",
        "428, -100, b'/', 1",
        "430, b'tmpfs', 0",
    ),
    raising(
        "other identities", "os.setuid(0)\nos.setgid(0)\nos.setgroups([0])\nos.setresuid(0, 0, 0)\nos.chroot('/tmp')"
    ),
    refused(
        "capabilities, personality, keys",
        "126, 0, 0",
        "135, 0xFFFFFFFF",
        "250, 0, 0",
        "248, b'user', b'x', b'y', 1, -1",
    ),
    refused("bpf, perf, io_uring, seccomp", "321, 0, 0, 0", "298, 0, 0, -1, -1, 0", "425, 8, 0", "317, 0, 0, 0"),
    refused(
        "handles, modules, reboot, swap",
        "303, 0, 0, 0",
        "304, 0, 0, 0",
        "175, 0, 0, b''",
        "313, 0, b'', 0",
        "169, 0, 0, 0, 0",
        "167, b'/tmp/x', 0",
    ),
    refused("clock, host name, sync, quota", "227, 0, 0", "170, b'x', 1", "162", "306, 0", "179, 0, 0, 0, 0", "163, 0"),
    refused("ldt, ioperm, port access", "154, 0, 0, 0", "173, 0, 1, 1", "172, 3"),
    refused("process descriptors, landlock, ioprio", "438, 0, 0, 0", "424, 0, 9, 0, 0", "444, 0, 0, 0", "251, 1, 0, 0"),
    Attack(
        "32-bit system call",
        NATIVE
        + """
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print('before', flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
""",
        ("killed",),
        "before\n",
    ),
    Attack(
        "x32 system call", NATIVE + "print('before', flush=True)\nprint(call(0x40000000 + 39))", ("killed",), "before\n"
    ),
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
    raising(
        "terminal input and devices by ioctl",
        "import fcntl; fcntl.ioctl(0, 0x5412, b'x')\nimport fcntl; fcntl.ioctl(1, 0x8933, bytes(40))",
    ),
    Attack(
        "memory in the hands of the host's crash handler",
        NATIVE + "print('held' if libc.prctl(3) == 0 and libc.prctl(4, 1) < 0 and libc.prctl(3) == 0 else 'free')",
    ),
    Attack(
        "undoing the filter",
        NATIVE
        + "print('held' if libc.prctl(22, 0, 0) < 0 and libc.prctl(4, 0) < 0 and libc.prctl(38, 0, 0, 0, 0) < 0 else 'free')",
    ),
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
    Attack(
        "garbage on the report page",
        """
        import sys, ctypes, os
        frame = sys._getframe()
        while frame:
            if isinstance(frame.f_locals.get('report'), int):
                ctypes.memset(frame.f_locals['report'], 0x5b, 4096)
            frame = frame.f_back
        os._exit(1)
        """,
        ("error",),
        "",
    ),
    Attack("its own exit code 125", "import os; os._exit(125)", ("error",), ""),
    Attack(
        "fresh randomness",
        "import random, os, uuid; print('held' if len({random.random(), random.random()}) == 2 else 0)",
    ),
)
