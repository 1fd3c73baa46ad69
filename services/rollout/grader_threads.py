"""Threads for the graders that users write: so many run at a time, and one that hangs takes nothing else with it.

They are not the event loop's own threads, which weights and engines need and which an ending process waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from singlestream.errors import DeadlineExceeded, SinglestreamError

T = TypeVar("T")

TIMEOUT_S = 60.0
"""A call that takes longer fails its trajectory."""
CALLS = 32
"""Calls at a time; the others wait without a deadline of their own, for each that runs has one."""
MOST_HUNG = 16
"""A thread cannot be ended: each that hangs keeps its memory and, if it computes, its share of the interpreter."""


class GradersHang(SinglestreamError):
    """So many calls never came back that the process must be replaced."""


class GraderThreads:
    """Calls functions in daemon threads, one thread a call.

    Args:
        calls: at a time.
        timeout_s: for one call, from when it has its thread.
        most_hung: calls beyond their time-out that still run; with one more the process has to end.
    """

    def __init__(self, calls: int = CALLS, timeout_s: float = TIMEOUT_S, most_hung: int = MOST_HUNG) -> None:
        self.timeout_s, self.most_hung = timeout_s, most_hung
        self.hung = 0
        self._free = asyncio.Semaphore(calls)

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            DeadlineExceeded: it took longer than the time-out; its thread is left to itself.
            GradersHang: likewise, and it is one too many.
            Exception: whatever the function raises.
        """
        async with self._free:
            ended = _in_thread(function, *arguments)
            try:
                result, error = await in_time(asyncio.shield(ended), function, self.timeout_s)
            except DeadlineExceeded as cause:
                if self.hung >= self.most_hung:
                    raise GradersHang(f"{self.hung + 1} calls of graders hang; the last: {cause}") from cause
                raise
            finally:
                if not ended.done():
                    self.hung += 1
                    ended.add_done_callback(self._came_back)
        if error is not None:
            raise error
        return result

    def _came_back(self, _: asyncio.Future[Any]) -> None:
        self.hung -= 1


async def in_time(answer: Awaitable[T], function: Callable[..., Any], timeout_s: float) -> T:
    """What a grader's answer comes to. Raises `DeadlineExceeded`, which names the grader, or what the answer raises."""
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await answer
    except TimeoutError as error:
        if not deadline.expired():
            raise  # the grader's own
        raise DeadlineExceeded(f"the grader {_name(function)}", timeout_s) from error


def _in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[tuple[Any, BaseException | None]]:
    """Start the call; the future gets what it returned and what it raised."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result((result, error))

    def run() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
        except BaseException as raised:  # SystemExit would end the replica instead of one trajectory
            error = RuntimeError(f"the grader {_name(function)} raised {raised!r}")
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=f"grader {_name(function)}", daemon=True).start()
    return ended


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', function)}"


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, GraderThreads] = WeakKeyDictionary()


def shared_threads() -> GraderThreads:
    """The threads of the running event loop."""
    return _shared.setdefault(asyncio.get_running_loop(), GraderThreads())
