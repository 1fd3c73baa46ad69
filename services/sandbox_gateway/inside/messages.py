"""Messages between the gateway and a zygote.

Orders and replies travel over one SOCK_SEQPACKET socket: fixed-size records, little-endian, file descriptors attached.
The zygote holds capabilities, so it never sees anything that a snippet can shape: an order is numbers only, and the
program travels over a line of the run's own, which is read by nobody but the child that is locked down already.

Example:
    >>> program = Program(memory_bytes=1 << 30, cpu_s=12, seed=-1, echo=False, source=b"print(1)")
    >>> Program.unpack(program.pack()) == program
    True
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

READY = 0
"""The zygote is warm; ``value`` is its resident memory in bytes."""
STARTED = 1
"""A run was forked and is being locked down; its pidfd is attached."""
EXITED = 2
"""A run is dead and reaped; ``value`` is its wait status."""
REFUSED = 3
"""A run could not be forked; ``value`` is the errno."""

REPORT_BYTES = 4096
"""Size of the page on which a run leaves its uncaught exception (or why its set-up failed)."""

ORDER_FDS = 5
"""Descriptors of an order: stdin, stdout, stderr, report page, line."""

LOCKED = b"L"
"""What a run says on its line once the filter stands."""

_ORDER = struct.Struct("<QQ")
_PROGRAM = struct.Struct("<QQq?")
_REPLY = struct.Struct("<BQqdQ")


class Order(NamedTuple):
    """Gateway → zygote: fork a run. :data:`ORDER_FDS` descriptors are attached."""

    run_id: int
    """Number of the run, unique within the gateway."""
    tmp_bytes: int
    """Size of the private /tmp."""

    def pack(self) -> bytes:
        """The record on the wire."""
        return _ORDER.pack(*self)

    @classmethod
    def unpack(cls, record: bytes) -> Order:
        """Read a record; raises ``struct.error`` if it has another size."""
        return cls._make(_ORDER.unpack(record))


class Program(NamedTuple):
    """Gateway → locked-down run: what to do. It ends where the line ends."""

    memory_bytes: int
    """Address space beyond that of the warm interpreter."""
    cpu_s: int
    """Whole seconds of CPU time of all threads together (RLIMIT_CPU)."""
    seed: int
    """Seed of the random generators; −1 takes one from the operating system."""
    echo: bool
    """Whether the value of a last expression is shown."""
    source: bytes
    """The snippet, UTF-8."""

    def pack(self) -> bytes:
        """The bytes on the line."""
        return _PROGRAM.pack(*self[:-1]) + self.source

    @classmethod
    def unpack(cls, data: bytes) -> Program:
        """Read it; raises ``struct.error`` if it is cut short."""
        return cls._make((*_PROGRAM.unpack_from(data), data[_PROGRAM.size :]))


class Reply(NamedTuple):
    """Zygote → gateway."""

    kind: int
    """READY, STARTED, EXITED or REFUSED."""
    run_id: int
    """The run it is about; 0 for READY."""
    value: int = 0
    """Depends on the kind, see there."""
    cpu_s: float = 0.0
    """EXITED: user and system time in seconds."""
    max_rss_kb: int = 0
    """EXITED: peak resident memory in KiB, pages shared with the zygote included."""

    def pack(self) -> bytes:
        """The record on the wire."""
        return _REPLY.pack(*self)

    @classmethod
    def unpack(cls, record: bytes) -> Reply:
        """Read a record; raises ``struct.error`` if it has another size."""
        return cls._make(_REPLY.unpack(record))


def read_report(page: bytes) -> dict[str, Any]:
    """What a run left on its report page, hostile bytes: a JSON object; empty if there is none or it is damaged."""
    text, end, _ = page.partition(b"\0")
    if not text or not end:
        return {}
    try:
        report = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}
