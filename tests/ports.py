"""Ports for services under test."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_000
"""Below those that the kernel gives to whoever asks for any (from 32,768), above those of Ray (to 19,999): between
the choice of a port and its service's start nobody comes by it by chance.
"""
TRIES = 100

_chance = random.SystemRandom()  # not seeded: two test runs on one machine must not choose alike
_given: set[int] = set()


def free_port() -> int:
    """A port of loopback on which nothing listens, another one at each call."""
    for _ in range(TRIES):
        port = _chance.randint(FIRST, LAST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
    raise AssertionError(f"{TRIES} ports from {FIRST} to {LAST} are all taken")
