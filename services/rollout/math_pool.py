"""Mathematical equality in processes of its own: math-verify can run for seconds, and ends only what it can interrupt.

The parent keeps the deadline. A process that misses it is killed and replaced, so nothing that a policy writes can hang
or end the replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import sys
from pathlib import Path
from weakref import WeakKeyDictionary

log = logging.getLogger(__name__)

DEADLINE_S = 5.0
"""Simple answers take 3 ms, hard ones up to 0.7 s."""
START_S = 60.0
"""Starting a process imports sympy."""
PROCESSES = 2
MAX_CHARS = 2000
"""Longer answers are not compared."""
INTEGER = re.compile(r"[+-]?\d+")
ROOT = Path(__file__).resolve().parents[2]


def integers_equal(truth: str, answer: str) -> bool | None:
    """Whether two integers are equal; None if one of them is none, so that more than digits must be compared."""
    if not INTEGER.fullmatch(truth.strip()) or not INTEGER.fullmatch(answer.strip()):
        return None
    if max(len(truth), len(answer)) > MAX_CHARS:
        return False
    return int(truth) == int(answer)


class MathPool:
    """Compares answers in child processes.

    Args:
        processes: comparisons at a time.
        deadline_s: for one comparison, from when a process takes it.
    """

    def __init__(self, processes: int = PROCESSES, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self.timeouts = 0
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        for _ in range(processes):
            self._idle.put_nowait(None)

    async def equal(self, truth: str, answer: str) -> bool:
        """Whether the two are equal; False if that could not be found out by the deadline.

        Raises:
            RuntimeError: a process could not be started; math-verify may not be installed.
        """
        quick = integers_equal(truth, answer)
        if quick is not None or len(answer) > MAX_CHARS:
            return bool(quick)
        process = await self._idle.get()
        try:
            if process is None or process.returncode is not None:
                process = await self._start()
            return await self._ask(process, truth, answer)
        except (TimeoutError, ConnectionError, ValueError) as error:
            self.timeouts += 1
            log.warning("no comparison of %r with %r: %r", answer[:200], truth[:200], error)
            await _kill(process)
            process = None
            return False
        except BaseException:
            await _kill(process)
            process = None
            raise
        finally:
            self._idle.put_nowait(process)

    async def _ask(self, process: asyncio.subprocess.Process, truth: str, answer: str) -> bool:
        assert process.stdin is not None  # noqa: S101  both are pipes
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(json.dumps([truth, answer]).encode() + b"\n")
        async with asyncio.timeout(self.deadline_s):
            await process.stdin.drain()
            return bool(json.loads(await process.stdout.readline()))

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.rollout.math_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout is not None  # noqa: S101  a pipe
        try:
            async with asyncio.timeout(START_S):
                ready = await process.stdout.readline()
        except BaseException:
            await _kill(process)
            raise
        if ready != b"ready\n":
            await _kill(process)
            raise RuntimeError("the math-verify process did not start: is the package math-verify installed?")
        return process

    async def close(self) -> None:
        """End the processes that are idle."""
        for _ in range(self._idle.qsize()):
            await _kill(self._idle.get_nowait())
            self._idle.put_nowait(None)


async def _kill(process: asyncio.subprocess.Process | None) -> None:
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


_pools: WeakKeyDictionary[asyncio.AbstractEventLoop, MathPool] = WeakKeyDictionary()


def shared_pool() -> MathPool:
    """The pool of the running event loop; its processes end with this one, whose end closes their input."""
    return _pools.setdefault(asyncio.get_running_loop(), MathPool())
