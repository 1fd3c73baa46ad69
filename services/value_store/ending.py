"""Ending tasks for good."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

END_WITHIN_S = 5.0
"""Tasks that have been cancelled get so long."""


async def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks until each has ended, within `END_WITHIN_S`; those that have not by then are logged.

    Once is not enough: redis-py sends under `asyncio.wait_for`, and that of Python 3.11 forgets a cancellation that
    comes as the sending ends (CPython issue 86296, mended in 3.12).
    """
    deadline = time.monotonic() + END_WITHIN_S
    while (running := [task for task in tasks if not task.done()]) and time.monotonic() < deadline:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=0.2)  # awaiting a task itself would mix its cancellation up with this one's
    if running:
        log.error("%s did not end within %.0f s", ", ".join(task.get_name() for task in running), END_WITHIN_S)
