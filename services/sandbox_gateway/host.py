"""What this host, or this container, has: cores and memory, as limited by control groups of either version."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

RESERVE_BYTES = 1 << 30
"""Memory left for the gateway, the zygotes and the kernel."""


def cores(root: Path = Path("/")) -> int:
    """Cores that may be used: the affinity mask, lowered by a CPU quota, at least 1."""
    count = len(os.sched_getaffinity(0))
    for folder in _cgroup_folders(root, "cpu"):
        fields = (_read(folder / "cpu.max") or "").split()
        if len(fields) != 2:
            fields = [_read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""]
        if all(f.isdigit() and int(f) > 0 for f in fields):
            count = min(count, max(1, math.floor(int(fields[0]) / int(fields[1]) + 0.01)))
    return max(1, count)


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory that may be used: the machine's, lowered by the smallest limit of this process's control groups."""
    total = int((_read(root / "proc/meminfo") or "MemTotal: 0 kB").split("MemTotal:")[1].split()[0]) * 1024
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text is not None and text.isdigit() and int(text) > 0:
                total = min(total, int(text))
    return total


def memory_shortfall(slots: int, memory_mb: int, available_bytes: int) -> str | None:
    """Why so many slots do not fit, with the mend; None if they fit."""
    needed = (slots * memory_mb << 20) + RESERVE_BYTES
    if needed <= available_bytes:
        return None
    fitting = max(0, (available_bytes - RESERVE_BYTES) // (memory_mb << 20))
    return (
        f"{slots} slots of {memory_mb} MiB and 1 GiB of reserve need {needed >> 20} MiB, this host or container has "
        f"{available_bytes >> 20} MiB: set sandbox_gateway.slots to at most {fitting}, "
        "lower memory_mb, or raise the memory limit"
    )


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders that may limit this process, from its own group up to the top.

    Inside a container the path may lead nowhere; the top is the container's own group then.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
            folder = top / path.strip("/")
            while True:
                yield folder
                if folder == top:
                    break
                folder = folder.parent


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
