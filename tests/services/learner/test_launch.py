"""The launcher of several ranks: however it is stopped, they are too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.services.learner.recorded import ROOT
from tests.services.learner.waiting import DEADLINE_S

RANK = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def stop(*_):
    (folder / f"{rank}-stopped").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / f"{rank}-up").touch()
time.sleep(600)
"""
"""In the place of a rank, which at a stop ends its step and leaves a checkpoint: that is another test's."""
LAUNCHER = """
import os, signal, subprocess, sys, time
from services.learner import launch
launch.COMMAND = (sys.executable, "-c", sys.argv[1])
folder, stop_after_first, start = sys.argv[2], sys.argv[3] == "stop", subprocess.Popen
def started(*arguments, **options):
    child = start(*arguments, **options)
    while stop_after_first and not os.path.exists(folder + "/0-up"):
        time.sleep(0.01)
    if stop_after_first:
        os.kill(os.getpid(), signal.SIGTERM)
    return child
subprocess.Popen = started
sys.exit(launch.launch(2, [folder]))
"""


Launcher = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """Starts it; no rank outlives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(how: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path), how]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(true: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline_s, f"{what}: not after {DEADLINE_S} s"
        time.sleep(0.01)


@pytest.mark.timeout(400)
def test_a_launcher_that_is_killed_stops_its_ranks(tmp_path: Path, launcher: Launcher) -> None:
    """Else they would hold the metrics port, and no later start would come as far as the fence that ends them."""
    process = launcher("run")
    until(lambda: len(list(tmp_path.glob("*-up"))) == 2, "both ranks are up")
    process.kill()
    process.wait(DEADLINE_S)
    until(lambda: len(list(tmp_path.glob("*-stopped"))) == 2, "both ranks are told to stop")


@pytest.mark.timeout(400)
def test_a_stop_between_two_starts_reaches_the_rank_that_runs(tmp_path: Path, launcher: Launcher) -> None:
    process = launcher("stop")
    assert process.wait(DEADLINE_S) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0-up", "0-stopped"}, "the other is not started any more"
