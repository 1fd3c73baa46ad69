"""Start Ray on a busy machine: it gives itself 30 s, whatever it is told, raises a bare error, and leaves processes."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from singlestream.errors import DeadlineExceeded

log = logging.getLogger(__name__)

PAUSE_S = 2.0
"""Before the next attempt; each pause is twice as long as the one before, up to a minute."""


def patiently(start: Callable[[], object], deadline_s: float) -> None:
    """Start Ray, again and again. To be called by the main thread.

    Args:
        start: starts it; the processes that it leaves when it fails are killed.
        deadline_s: no further attempt begins later.

    Raises:
        DeadlineExceeded: the last attempt failed; names its error.
    """
    began, others, pause_s = time.monotonic(), _children(), PAUSE_S
    while True:
        try:
            start()
            return
        except Exception as error:  # the boundary of Ray
            for child in _children() - others:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if (waited_s := time.monotonic() - began) + pause_s > deadline_s:
                raise DeadlineExceeded(f"Ray to start (last error: {error})", waited_s) from error
            log.warning("Ray did not start, once more in %.0f s: %s", pause_s, error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 60.0)


def _children() -> set[int]:
    """Processes that this thread has started."""
    return {int(number) for number in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
