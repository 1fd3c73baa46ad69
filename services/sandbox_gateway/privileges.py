"""Started as root on a developer's machine, the gateway becomes an ordinary user before it does anything else.

Root's Python often lives where nobody else can look (``/root/.pyenv`` under a ``/root`` of mode 0700). So before the
change of user a private mount namespace puts what the gateway needs of such folders back in place, read-only, and hides
the rest of them.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

UNPRIVILEGED_ID = 10001
"""User and group the gateway becomes; the same as in its container image. It needs no entry in /etc/passwd."""

_CLONE_NEWNS = 0x00020000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MS_NOSUID, _MS_NODEV = 2, 4
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 2, 4


class CannotDrop(Exception):
    """Root cannot become an ordinary user here; the text says why and what to do."""


def become_unprivileged(needed: Iterable[Path]) -> None:
    """Become an unprivileged user for good, unless this process is one already. Call it before there are threads.

    Args:
        needed: files and folders that must stay readable.

    Raises:
        CannotDrop: without the rights to change user or mounts, as in a container that dropped its capabilities.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    parent, death_signal = os.getppid(), ctypes.c_int()
    try:
        _expose([Path(os.path.abspath(path)) for path in needed])
        _check(libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(death_signal), 0, 0, 0), "ask for the death signal")
        os.setgroups([])
        os.setresgid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        os.setresuid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        # With the change of user the kernel gave this process's /proc files to root, which it needs itself, and forgot
        # what a supervisor asked for: that the gateway ends with it.
        _check(libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "stay dumpable")
        _check(libc.prctl(_PR_SET_PDEATHSIG, death_signal.value, 0, 0, 0), "keep the death signal")
    except OSError as error:
        mend = f"start the gateway as an ordinary user (in a container: user: '{UNPRIVILEGED_ID}')"
        raise CannotDrop(
            f"it never runs as root, and cannot become uid {UNPRIVILEGED_ID} here ({error}): {mend}"
        ) from error
    if death_signal.value and os.getppid() != parent:
        raise CannotDrop("whoever started it has ended meanwhile")


def _expose(needed: list[Path]) -> None:
    """Make the needed paths readable for everyone, in a mount namespace of this process."""
    closed: dict[Path, set[Path]] = {}
    for path in {p for name in needed if name.exists() for p in (name, name.resolve())}:
        if (folder := _closed_ancestor(path)) is not None:
            closed.setdefault(folder, set()).add(path)
    if not closed:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS), "unshare mounts")
    _mount(libc, None, "/", None, _MS_REC | _MS_PRIVATE)
    for folder, paths in closed.items():
        handles = {path: os.open(path, os.O_PATH) for path in paths}
        _mount(libc, "tmpfs", str(folder), "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
        for path, handle in sorted(handles.items()):
            if path.exists():  # a needed path inside a needed folder came back with that folder
                continue
            _make_target(path, stat.S_ISDIR(os.fstat(handle).st_mode))
            _mount(libc, f"/proc/self/fd/{handle}", str(path), None, _MS_BIND | _MS_REC)
            _mount(libc, None, str(path), None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
        for handle in handles.values():
            os.close(handle)
    os.chdir(os.getcwd())  # the working directory may be one of the covered ones


def _closed_ancestor(path: Path) -> Path | None:
    """The topmost folder above a path that others may not enter; None if the path can be reached."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def _make_target(path: Path, is_folder: bool) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if is_folder:
        path.mkdir(mode=0o755)
    else:
        path.touch(mode=0o644)


def _mount(
    libc: ctypes.CDLL, source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    result = libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mount {target}")


def _check(result: int, step: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{step}: {os.strerror(code)}")


def needed_paths(config_file: Path | None, sandbox_python: str) -> list[Path]:
    """What the gateway must be able to read: both Pythons, its code, its configuration, its working directory."""
    paths = [
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(sys.executable),
        Path(sandbox_python),
        Path(sandbox_python).resolve(),
    ]
    paths += [Path(__file__).parents[2], Path.cwd(), *(Path(entry) for entry in sys.path if entry)]
    # A virtual environment's python is bin/python, so its prefix is two levels up; the same holds for what the link
    # leads to.
    paths += [Path(sandbox_python).parents[1], Path(sandbox_python).resolve().parents[1]]
    return paths if config_file is None else [*paths, config_file]
