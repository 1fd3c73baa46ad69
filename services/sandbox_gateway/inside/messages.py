"""Messages between the gateway and a zygote.

They travel over one SOCK_SEQPACKET socket: fixed-size records, little-endian, file descriptors attached. The zygote
holds a capability, so it never parses anything that a snippet can shape: an order is numbers only, and the snippet's
text travels as a descriptor that only the locked-down child reads.

Example:
    >>> order = Order(run_id=7, memory_bytes=1 << 30, cpu_s=12, tmp_bytes=32 << 20, seed=-1, echo=False)
    >>> Order.unpack(order.pack()) == order
    True
"""

from __future__ import annotations

import struct
from typing import NamedTuple

READY = 0
"""The zygote is warm; ``value`` is its resident memory in bytes."""
STARTED = 1
"""A run was forked; its pidfd is attached."""
EXITED = 2
"""A run is dead and reaped; ``value`` is its wait status."""
REFUSED = 3
"""A run could not be forked; ``value`` is the errno."""

REPORT_BYTES = 4096
"""Size of the page on which a run leaves its uncaught exception (or why its set-up failed)."""

ORDER_FDS = 6
"""Descriptors of an order: code, stdin, stdout, stderr, report page, locked-down event."""

_ORDER = struct.Struct("<QQQQq?")
_REPLY = struct.Struct("<BQqdQ")


class Order(NamedTuple):
    """Gateway → zygote: fork a run. :data:`ORDER_FDS` descriptors are attached."""

    run_id: int
    """Number of the run, unique within the gateway."""
    memory_bytes: int
    """Address space beyond that of the warm interpreter."""
    cpu_s: int
    """Whole seconds of CPU time of all threads together (RLIMIT_CPU)."""
    tmp_bytes: int
    """Size of the private /tmp."""
    seed: int
    """Seed of the random generators; −1 takes one from the operating system."""
    echo: bool
    """Whether the value of a last expression is shown."""

    def pack(self) -> bytes:
        """The record on the wire."""
        return _ORDER.pack(*self)

    @classmethod
    def unpack(cls, record: bytes) -> Order:
        """Read a record; raises ``struct.error`` if it has another size."""
        return cls._make(_ORDER.unpack(record))


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
