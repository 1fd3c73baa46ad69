"""What the inside of the jail sees: the bubblewrap command line of a zygote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from services.sandbox_gateway.faults import IsolationUnavailable, fault_of

INSIDE = Path(__file__).parent / "inside"
SYSTEM_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/lib32")
"""Shared libraries. Not /usr/bin (nothing may be executed), not /etc, not /usr/share."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
"""Bound one by one: bubblewrap's own --dev is a writable tmpfs with a pts and a shm."""
NOBODY = "65534"


@dataclass(frozen=True)
class Interpreter:
    """A Python and the folders that it needs, at the same paths inside the jail as outside."""

    executable: str
    """The interpreter to start, for example a virtual environment's ``bin/python``."""
    folders: tuple[str, ...]
    """Folders to show, read-only."""
    links: tuple[str, ...]
    """Files outside those folders through which the interpreter is reached; the interpreter itself is shown at each."""


@cache
def find_interpreter(executable: str) -> Interpreter:
    """Find out where a Python lives.

    Raises:
        SandboxFault: it does not start.
    """
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    if executable != sys.executable:
        folders = _ask_for_folders(executable)
    # A Python in /usr shares its prefix with the whole system, and needs its libraries only.
    shown = {f"{folder}/lib" if folder in ("/usr", "/usr/local") else folder for folder in folders} - {"/usr/lib"}
    links = [link for link in _links(Path(executable)) if not any(link.is_relative_to(folder) for folder in shown)]
    return Interpreter(executable, tuple(sorted(shown)), tuple(map(str, links)))


def _ask_for_folders(executable: str) -> set[str]:
    program = (
        "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]))"
    )
    try:
        answer = subprocess.run(
            [executable, "-I", "-c", program], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise fault_of(f"the sandbox's Python {executable} does not start", str(error)) from error
    return set(json.loads(answer.stdout))


def _links(path: Path) -> Iterator[Path]:
    """A path and what it leads to, link by link."""
    yield path
    while path.is_symlink():
        path = Path(os.path.normpath(path.parent / path.readlink()))
        yield path


def bubblewrap_command(
    interpreter: Interpreter, control_fd: int, proc_fd: int, bpf_fd: int, preload: tuple[str, ...]
) -> list[str]:
    """The command that starts a zygote.

    Raises:
        IsolationUnavailable: bubblewrap is not installed.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise IsolationUnavailable("bubblewrap (bwrap) is not installed: apt-get install bubblewrap")
    command = [
        bubblewrap,
        *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
        # The jail dies with the gateway. It stays in the gateway's session, so that their nice values compare (see
        # lockdown.py); it has no terminal open and cannot open one, so it can push no characters into it.
        "--die-with-parent",
        # The zygote may make pid and mount namespaces and join them (below its own user namespace), and nothing else.
        *("--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SYS_CHROOT"),
        *("--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"),
    ]
    for folder in SYSTEM_FOLDERS:
        if os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
            command += ["--symlink", folder.removeprefix("/"), folder.removeprefix("/usr")]
    for folder in interpreter.folders:
        command += ["--ro-bind", folder, folder]
    for link in interpreter.links:
        command += ["--ro-bind", os.path.realpath(interpreter.executable), link]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--ro-bind", str(INSIDE), "/sandbox/inside", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]  # noqa: S108
    environment = {
        "HOME": "/tmp",  # noqa: S108
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        # One thread: the zygote must not have others when it forks, and slots already fill the cores.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # pandas loads pyarrow where it is installed, whose allocator would start a background thread.
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
        # All forks share one hash seed anyway; a fixed one makes the order of sets repeatable.
        "PYTHONHASHSEED": "0",
    }
    command.append("--clearenv")
    for name, value in environment.items():
        command += ["--setenv", name, value]
    start = "import sys; sys.path.insert(0, '/sandbox'); from inside.zygote import main; sys.path.pop(0); main()"
    # -P and -s: nothing is imported from the working directory or a home; -B: no .pyc; -u: what a killed run has
    # printed has been sent. Not -I, which would ignore the hash seed above.
    python = [interpreter.executable, "-P", "-s", "-B", "-u", "-c", start]
    return [*command, "--", *python, str(control_fd), str(proc_fd), str(bpf_fd), json.dumps(preload)]
