"""Processes under test."""

from __future__ import annotations

import psutil


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, reaped or not; it may do so while it is asked."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
