"""Writes one behind the other, while the next is computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

SENDING_TURNS = 4
"""Turns of the event loop in which a command has gone out: redis-py sends in a task, uvloop at the end of a turn."""

Write = Callable[[Coroutine[Any, Any, None]], Awaitable[None]]
"""Waits for the write before, starts this one and sees it sent; raises what the one before raised."""


@asynccontextmanager
async def one_behind_the_other() -> AsyncIterator[Write]:
    """A function that starts writes. None is started before the one before has ended well; with the context all have.

    Leaving it by an error cancels the write under way, whose outcome is then not known.
    """
    last: asyncio.Task[None] | None = None

    async def write(one: Coroutine[Any, Any, None]) -> None:
        nonlocal last
        try:
            if last is not None:
                await last
        except BaseException:
            one.close()
            raise
        last = asyncio.create_task(one)
        for _ in range(SENDING_TURNS):
            await asyncio.sleep(0)

    try:
        yield write
        if last is not None:
            await last
    finally:
        if last is not None:
            last.cancel()
            await asyncio.gather(last, return_exceptions=True)
