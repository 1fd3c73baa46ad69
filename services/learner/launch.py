"""Start the ranks of one machine without torchrun: they end together, and a stop reaches all of them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

log = logging.getLogger(__name__)

GRACE_S = 60.0
"""Ranks that outlive a failed peer for so long are killed."""
POLL_S = 0.1
COMMAND = (sys.executable, "-m", "services.learner")
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that a process gets when its parent dies."""
_libc = ctypes.CDLL(None)


def free_port() -> int:
    """A free TCP port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(ranks: int, arguments: list[str]) -> int:
    """Run ``python -m services.learner`` once a rank.

    Args:
        ranks: processes.
        arguments: command line of each.

    Returns:
        0 where every rank ended well, else the first failed rank's exit code.
    """
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):  # first: a stop may come between two starts
        signal.signal(number, forward)
    for rank in range(ranks):
        if received:
            break
        child = subprocess.Popen(
            [*COMMAND, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
            preexec_fn=_end_with_the_launcher,
        )
        children.append(child)
    if received:  # also the one that was being started meanwhile
        for child in children:
            child.terminate()
    return _watch(children)


def _end_with_the_launcher() -> None:
    """In a rank, before it runs: a launcher that is killed stops it too. It holds the port that a next start needs."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch(children: list[subprocess.Popen[bytes]]) -> int:
    failed_at_s, code = None, 0
    while any(child.poll() is None for child in children):
        failed = [child.returncode for child in children if child.poll() not in (None, 0)]
        if failed and failed_at_s is None:
            failed_at_s, code = time.monotonic(), abs(failed[0])
            log.error("a rank ended with %d: stopping the others", failed[0])
            for child in children:
                child.terminate()
        if failed_at_s is not None and time.monotonic() - failed_at_s > GRACE_S:
            for child in children:
                child.kill()
        time.sleep(POLL_S)
    return code or next((abs(child.returncode) for child in children if child.returncode), 0)
