"""A Ray that does not start in its own time is started again; nothing of the failed start is left."""

from __future__ import annotations

import subprocess

import pytest

from services.rollout import ray_start
from services.rollout.ray_start import patiently
from singlestream.errors import DeadlineExceeded


class SlowRay:
    """Fails so many times, each time leaving a process behind, as Ray does."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.left: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.left.append(subprocess.Popen(["sleep", "600"]))
        if len(self.left) <= self.failures:
            raise Exception("The current node timed out during startup")


def test_a_slow_start_is_tried_again_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "PAUSE_S", 0.05)
    other, slow = subprocess.Popen(["sleep", "600"]), SlowRay(2)
    patiently(slow.start, 60.0)
    *failed, running = slow.left
    assert len(failed) == 2
    assert [one.poll() is None for one in (*failed, running, other)] == [False, False, True, True]
    for one in (running, other):
        one.kill()
        one.wait()


def test_a_start_that_never_succeeds_is_named() -> None:
    slow = SlowRay(1000)
    with pytest.raises(DeadlineExceeded, match=r"Ray to start .*timed out during startup"):
        patiently(slow.start, 0.05)
    assert all(one.poll() is not None for one in slow.left)
