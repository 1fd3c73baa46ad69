"""The home-made privileged part: how a forked child gives up everything before it looks at model-written code.

Where it stands. bubblewrap has already built the outer jail, once per zygote: its own user, pid, network, ipc, uts and
mount namespaces; a read-only view that holds the Python, its libraries and four device nodes; no /proc, no network
interface but a loopback that nobody listens on; an empty environment. Every run is forked from the zygote in that jail
and passes through :func:`lock_down`, once, top to bottom, before its program exists: only a run that says that it is
locked down is sent one, and one program is all that it ever gets. Any step that fails ends it as a fault of the
sandbox.

Threat model. The snippet is hostile, native code included (ctypes gives it any instruction), and knows this file.

Covered:
    - reading or changing the host, the gateway, its secrets, another run, a later run (poisoned modules, files, shared
      memory, locks);
    - network of every family; starting processes; outliving the run; signals to anything outside it;
    - exhausting memory, processes, threads, files, inodes, disk, descriptors, pipe and socket buffers, output;
    - faking its outcome: the exit status is the kernel's word (wait4), time-outs are the gateway's; a fault of the
      sandbox cannot be faked, as the lock-down was over before the program was sent.

Not covered:
    - a bug in the kernel behind one of the permitted calls (the filter makes that surface small; a VM per run would
      make it smaller);
    - side channels of shared hardware and shared page cache, covert channels between runs that cooperate, and slowing
      neighbours down by saturating memory bandwidth or caches, or processors for the quarter of a second after which
      the gateway puts a run behind shorter ones;
    - layout secrecy between runs: forks of one zygote share their address-space layout, so a leak in one helps in the
      next; there is nothing in the zygote to attack, as it parses nothing that a run can shape, and it is replaced now
      and then;
    - what the snippet says about itself: text on its streams, and which exception ended it, are its own claims;
    - a hard cap of *physical* memory per run: the limit is on address space, and the container's own limit backs all
      runs together.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct

CLONE_VM, CLONE_FILES = 0x100, 0x400
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x08000000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
CAPABILITY_VERSION_3 = 0x20080522
LAST_CAPABILITY = 63

LINE = 3
"""Descriptor of a run's line to the gateway, until it has its program."""

MAX_THREADS = 32
MAX_OPEN_FILES = 64
MAX_FILE_BYTES = 16 << 20
MAX_TMP_INODES = 1024
MEMORY_ERROR_RESERVE_BYTES = 8 << 20
"""Soft and hard limit of memory differ by this, so that the runner can print the traceback of a MemoryError."""

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]


class SeccompProgram(ctypes.Structure):
    """``struct sock_fprog``: the compiled filter as the kernel takes it."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def compile_program(bpf: bytes) -> tuple[SeccompProgram, ctypes.Array[ctypes.c_char]]:
    """The filter as a C structure, with the buffer that it points into (keep both)."""
    buffer = ctypes.create_string_buffer(bpf, len(bpf))
    return SeccompProgram(len(bpf) // 8, ctypes.addressof(buffer)), buffer


def check(result: int, step: str) -> None:
    """Raise OSError naming the step if a libc call failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{step}: {os.strerror(code)}")


def join(fd: int, kind: int, step: str) -> None:
    """Enter a namespace: of mounts at once, of pids with the next fork."""
    check(libc.setns(fd, kind), step)


def write_proc(proc_fd: int, name: str, text: bytes) -> None:
    """Write a file of the calling process under /proc, reached through a descriptor as /proc is not mounted here."""
    fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc_fd)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


def limit(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a resource limit; the hard one too, so that it cannot be raised again."""
    resource.setrlimit(kind, (soft, soft if hard is None else hard))


def lock_down(init_fd: int, proc_fd: int, program: SeccompProgram, line_fd: int, tmp_bytes: int) -> None:
    """Give up everything. Afterwards only descriptors 0 to 3 are open and nothing here can be undone.

    Args:
        init_fd: pidfd of the first process of the run's namespaces; closed here.
        proc_fd: directory descriptor of /proc; closed here.
        program: the seccomp filter.
        line_fd: socket to the gateway, for the program; :data:`LINE` from here on.
        tmp_bytes: size of the private /tmp.

    Raises:
        OSError: a step failed; its text names the step. The caller must end the process.
    """
    # kill(0, …) reaches the whole process group, across pid namespaces: without one of its own a run could kill the
    # zygote and its siblings, which share its kernel uid. Not a session: Linux may schedule sessions as groups of equal
    # weight, and then no nice value would put a run behind the gateway, or behind another run.
    os.setpgid(0, 0)
    # Under memory pressure the kernel kills a run, not the gateway.
    write_proc(proc_fd, "oom_score_adj", b"1000")
    # Its own mounts: /tmp is seen by nobody else.
    join(init_fd, CLONE_NEWNS, "setns into the run's mount namespace")
    # The only writable place: private (nothing left for the next run), bounded in bytes and inodes (disk and inode
    # filling), no set-uid files, no device nodes, no executable mappings of files dropped there.
    options = b"size=%d,nr_inodes=%d,mode=0777" % (tmp_bytes, MAX_TMP_INODES)
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options), "mount private /tmp")
    os.chdir("/tmp")  # noqa: S108  the private one
    # A user namespace of its own, below the zygote's: whatever the run could do to "root in its namespace" does not
    # touch the zygote's, nor the mounts, which belong to that one. Its own ipc: SysV and POSIX queues left behind die
    # with it.
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWIPC), "unshare user and ipc namespaces")
    # Without this a later setgroups() could drop a group that denies access.
    write_proc(proc_fd, "setgroups", b"deny")
    # Only its own, unprivileged id exists: no other uid can be assumed.
    write_proc(proc_fd, "uid_map", b"%d %d 1" % (uid, uid))
    write_proc(proc_fd, "gid_map", b"%d %d 1" % (gid, gid))
    # Its memory is handed to nobody when it crashes: where core_pattern is a pipe, the kernel would start the host's
    # handler, as root and outside every namespace, whatever RLIMIT_CORE says. Nor may others with its kernel uid trace
    # it. Not earlier: files under /proc of a process that is not dumpable are root's.
    check(libc.prctl(PR_SET_DUMPABLE, 0, None, 0, 0), "become undumpable")
    # Inherited descriptors: the control socket, /proc and other runs' pidfds close; the line stays for the program.
    os.dup2(line_fd, LINE)
    check(libc.close_range(LINE + 1, 0xFFFFFFFF, 0), "close inherited descriptors")
    # Thread bombs; counted per user namespace (Linux ≥ 5.14), hence set after it was made.
    limit(resource.RLIMIT_NPROC, MAX_THREADS)
    # Descriptor exhaustion, and with it kernel memory held in pipes and sockets.
    limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    # One huge (sparse) file; core dumps; memory that cannot be swapped; POSIX queues; signals queued without end.
    limit(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_MEMLOCK, 0)
    limit(resource.RLIMIT_MSGQUEUE, 0)
    limit(resource.RLIMIT_SIGPENDING, 64)
    # The new user namespace granted every capability inside itself (mount, chroot, raw sockets): drop them from the set
    # that execve could regain from, up to the last one that this kernel has, then from the sets in force.
    for capability in range(LAST_CAPABILITY + 1):
        if libc.prctl(PR_CAPBSET_DROP, capability, None, 0, 0) < 0 and ctypes.get_errno() == errno.EINVAL:
            break
    check(libc.capset(struct.pack("<Ii", CAPABILITY_VERSION_3, 0), bytes(24)), "drop capabilities")
    # A busy loop yields to the gateway's work. Late, so that a busy machine does not hold up the steps above.
    os.nice(5)
    # Set-uid programs gain nothing, and an unprivileged process may load a filter.
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, None, 0, 0), "no new privileges")
    # The allow-list (policy.py): no new process, program, namespace, socket or exotic call, whatever the code does from
    # here on.
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program), 0, 0), "load the seccomp filter")


def bound(memory_bytes: int, cpu_s: int) -> None:
    """Set the limits that differ from run to run. The filter permits it, and no one can raise them again.

    Args:
        memory_bytes: limit of the whole address space, warm interpreter included.
        cpu_s: CPU seconds after which the kernel sends SIGXCPU, and a second later SIGKILL.
    """
    # Memory bombs (bytearray, numpy, mmap, threads' stacks) and CPU burnt while the wall clock is slow.
    limit(resource.RLIMIT_AS, memory_bytes, memory_bytes + MEMORY_ERROR_RESERVE_BYTES)
    limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
