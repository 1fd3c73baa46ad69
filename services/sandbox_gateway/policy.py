"""The system calls a snippet may make: a seccomp allow-list, compiled once with libseccomp.

Everything that is not listed fails with EPERM. What is listed is what CPython, numpy, scipy, sympy, pandas and an
asyncio loop without network use. The comments say what an entry would allow if it were wider.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import tempfile
import termios
from pathlib import Path

import pyseccomp as seccomp  # type: ignore[import-untyped]

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek open openat close close_range
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
getcwd chdir fchdir getdents getdents64 mkdir mkdirat rmdir rename renameat renameat2
unlink unlinkat link linkat symlink symlinkat chmod fchmod fchmodat umask utime utimes utimensat futimesat
truncate ftruncate fallocate copy_file_range sendfile dup dup2 dup3 pipe pipe2
mmap mprotect munmap mremap brk
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall
kill tkill tgkill pause getitimer setitimer alarm
select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2
timerfd_create timerfd_settime timerfd_gettime nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time
times getpid gettid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getgroups getresuid getresgid
getrlimit setrlimit prlimit64 getrusage sysinfo uname getcpu getpriority getrandom
sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
set_robust_list get_robust_list rseq futex exit exit_group wait4 waitid
sendto recvfrom shutdown getsockopt getsockname getpeername
""".split()  # noqa: SIM905  a table reads better than a hundred quoted words
"""Allowed with any argument. Signals reach only the run itself: it is alone in its pid namespace and process group.
sendto and recvfrom serve the socket pair of an asyncio loop; sendmsg is missing, as it can park descriptors in flight
beyond RLIMIT_NOFILE, and setsockopt, as it loads BPF programs.
"""

PRETENDED = ("fsync", "fdatasync", "msync")
"""Answered with success and not done: /tmp is memory, and on a read-only file they would make the host write out its
journal.
"""

UNSUPPORTED = (
    "getxattr",
    "lgetxattr",
    "fgetxattr",
    "listxattr",
    "llistxattr",
    "flistxattr",
    "setxattr",
    "lsetxattr",
    "fsetxattr",
)
"""ENOTSUP, which ``shutil.copy2`` expects where there are no extended attributes."""

CLONE_THREAD = 0x00010000
CLONE_NEW_ANYTHING = 0x7E020080
"""Every CLONE_NEW… flag: a run may start threads, never a process, never a namespace."""

FCNTL_COMMANDS = (
    fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_DUPFD_CLOEXEC,
    fcntl.F_GETLK,
)  # fmt: skip
"""No F_SETPIPE_SZ (pipe memory is accounted per user, so one run could shrink the pipes of all), no leases, no F_SETOWN
(signals), no locks of open files.
"""

PRETENDED_FCNTL_COMMANDS = (fcntl.F_SETLK, fcntl.F_SETLKW)
"""Answered with success and not done. A process never waits for a lock of its own, and a run is one process, so sqlite
sees no difference; a real lock would be kernel memory that no limit counts, and on /dev/null a signal to other runs.
"""

IOCTL_REQUESTS = (
    termios.TCGETS,
    termios.FIONREAD,
    termios.FIONBIO,
    termios.FIOCLEX,
    termios.FIONCLEX,
    termios.TIOCGWINSZ,
)
"""What isatty(), set_inheritable() and non-blocking sockets use."""

PRCTL_OPTIONS = (15, 16, 3, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_GET_DUMPABLE, PR_SET_VMA (glibc names its arenas with it)."""

MADVISE_ADVICE = (4, 8, 14, 15)
"""DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE (allocators); not PAGEOUT or COLD, which evict pages that other runs share."""

AF_UNIX = 1


@functools.cache
def compile_bpf() -> bytes:
    """The filter as BPF instructions.

    Calls of another architecture (32-bit entry points, x32) kill the process.
    """
    policy = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    policy.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    # A search tree instead of a list: the kernel tries every call against a filter when it is loaded, once a run.
    policy.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)
    for name in ALLOWED:
        _add(policy, seccomp.ALLOW, name)
    for name in PRETENDED:
        _add(policy, seccomp.ERRNO(0), name)
    for name in UNSUPPORTED:
        _add(policy, seccomp.ERRNO(errno.ENOTSUP), name)
    for name, position, values in (
        ("fcntl", 1, FCNTL_COMMANDS),
        ("ioctl", 1, IOCTL_REQUESTS),
        ("prctl", 0, PRCTL_OPTIONS),
        ("madvise", 2, MADVISE_ADVICE),
        ("socketpair", 0, (AF_UNIX,)),
    ):
        for value in values:
            _add(policy, seccomp.ALLOW, name, seccomp.Arg(position, seccomp.EQ, value))
    for command in PRETENDED_FCNTL_COMMANDS:
        _add(policy, seccomp.ERRNO(0), "fcntl", seccomp.Arg(1, seccomp.EQ, command))
    # clone3 hides its flags behind a pointer that a filter cannot follow; on ENOSYS glibc falls back to clone.
    _add(policy, seccomp.ERRNO(errno.ENOSYS), "clone3")
    threads_only = seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_NEW_ANYTHING | CLONE_THREAD, CLONE_THREAD)
    _add(policy, seccomp.ALLOW, "clone", threads_only)
    with tempfile.TemporaryFile() as file:
        policy.export_bpf(file)
        file.seek(0)
        return file.read()


def _add(policy: seccomp.SyscallFilter, action: object, name: str, *arguments: object) -> None:
    """Add a rule; calls that this architecture lacks (``open`` on arm64) are left out, which denies them."""
    if seccomp.resolve_syscall(seccomp.system_arch(), name) >= 0:
        policy.add_rule(action, name, *arguments)


@functools.cache
def policy_version() -> str:
    """Twelve hex digits over the filter and every file that makes the jail: equal versions isolate and run alike."""
    digest = hashlib.sha256(compile_bpf())
    here = Path(__file__).parent
    for path in sorted([*(here / "inside").glob("*.py"), here / "view.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
