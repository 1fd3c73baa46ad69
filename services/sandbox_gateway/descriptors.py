"""File descriptors with one owner: each is closed exactly once, whatever path leaves the block."""

from __future__ import annotations

import fcntl
import os
from types import TracebackType


class Descriptors:
    """Owns descriptors and closes at the end of the block those that are still open.

    Example:
        >>> with Descriptors() as owned:
        ...     read, write = owned.pipe(owned)
        ...     owned.close(write)
    """

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_all()

    def own(self, fd: int) -> int:
        """Take a descriptor over."""
        self._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """Close one of them now. A second time does nothing: the number may be someone else's by then."""
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)

    def close_all(self) -> None:
        """Close those that are still open."""
        while self._open:
            os.close(self._open.pop())

    def pipe(self, writers: Descriptors) -> tuple[int, int]:
        """A pipe whose read end does not block and is owned here; the write end is the other's."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        return self.own(read), writers.own(write)


def sealed_memory(name: str, data: bytes) -> int:
    """A memory file that nobody can change any more; the caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def shared_page(name: str, size_bytes: int) -> int:
    """A memory file of fixed size that whoever gets it may write; the caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd
