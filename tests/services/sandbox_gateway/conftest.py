"""One warm gateway for all tests that do not break it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.services.sandbox_gateway.gateway import Gateway

ATTACH = "SINGLESTREAM_TEST_SANDBOX"
"""``PID URL HOST`` of a running gateway to attack instead of one of the tests' own; HOST is the host's address as the
gateway sees it. deploy/sandbox_gateway/attack_container sets it.
"""


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    if attach := os.environ.get(ATTACH):
        pid, url, host = attach.split()
        attached = Gateway.attach(int(pid), url, host)
        yield attached
        attached.detach()
        return
    started = Gateway()
    yield started
    assert started.stop() == 0
