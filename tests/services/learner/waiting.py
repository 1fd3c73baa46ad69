"""Waiting for a learner process: for what Redis, its files or its log say, always with a deadline and its log as the
cause. The deadlines are those of a machine that is busy with other things."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

from redis import Redis

from singlestream.streams import Keys

DEADLINE_S = 150.0
"""For a process to start and take a few steps."""


def wait_until(true: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Return once it is true; the learner must live until then."""
    started = time.monotonic()
    while not true():
        if process.poll() is not None:
            raise AssertionError(f"the learner ended with {process.returncode}: {process.communicate()[0]}")
        if time.monotonic() - started > DEADLINE_S:
            process.kill()
            raise AssertionError(f"nothing after {DEADLINE_S} s: {process.communicate()[0]}")
        time.sleep(0.01)


def read_log_until(text: str, process: subprocess.Popen[str]) -> str:
    """The log's lines up to the first that has the text. What comes after it is still to be read."""
    assert process.stdout is not None
    seen = ""
    for line in iter(process.stdout.readline, ""):
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"the log ended without {text!r}: {seen}")


def end(process: subprocess.Popen[str]) -> str:
    """Wait for the process' end; returns what is left of its log. Raises TimeoutExpired after `DEADLINE_S`."""
    return process.communicate(timeout=DEADLINE_S)[0]


def resume_step(redis: Redis, keys: Keys) -> int:
    """Step of the checkpoint that a start would resume from; -1 before there is one."""
    pointer = redis.get(keys.resume)
    return int(pointer.split(b"-")[1]) if isinstance(pointer, bytes) else -1
