"""One warm gateway for all tests that do not break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.sandbox_gateway.gateway import Gateway


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    started = Gateway()
    yield started
    assert started.stop() == 0
