"""Shows the live line while a condition is awaited: in place on a terminal, once in a while elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from rich.console import Console

from singlestream.supervisor.status import read_queues, read_steps, render, since_step_s
from singlestream.supervisor.supervisor import Supervisor

REFRESH_S = 0.5
PLAIN_EVERY_S = 10.0
"""Where nobody watches a terminal, a line this often keeps the log short."""


async def show_until(supervisor: Supervisor, console: Console, done: Callable[[], bool]) -> None:
    """Show where the run stands until ``done()``."""
    started = time.monotonic()
    total_steps, path = supervisor.config.run.total_steps, supervisor.config.run.dir / "steps.jsonl"

    async def line() -> str:
        queues = await read_queues(supervisor.redis, supervisor.keys)
        since_s = min(since_step_s(path), time.monotonic() - started)  # a run taken up again has not stood still
        return render(read_steps(path), queues, total_steps, since_s)

    if console.is_terminal:
        with console.status("starting") as status:
            while not done():
                status.update(await line())
                await asyncio.sleep(REFRESH_S)
        console.print(await line())
        return
    last = 0.0
    while not done():
        if time.monotonic() - last > PLAIN_EVERY_S:
            console.print(await line())
            last = time.monotonic()
        await asyncio.sleep(REFRESH_S)
    console.print(await line())
