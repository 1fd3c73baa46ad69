"""A tiny random model, made once, and a factory of recorded runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys
from tests.ports import free_port
from tests.services.learner.recorded import Run, random_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen3 with random weights."""
    return random_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def sync_redis(redis_server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis(unix_socket_path=str(redis_server.socket)) as client:
        yield client


@pytest.fixture
def make_run(tiny: Path, redis_server: EmbeddedRedis, keys: Keys, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """A run of the test's own name; further names for comparisons. No process outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def make(
        suffix: str = "",
        run: dict[str, Any] | None = None,
        learner: dict[str, Any] | None = None,
        value_store: dict[str, Any] | None = None,
    ) -> Run:
        name = keys.run + suffix
        sections = (run or {}, learner or {}, value_store or {})
        return Run(tmp_path, tiny, redis_server.url, name, free_port(), *sections, processes)

    yield make
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
