"""A value store in a process of its own, reached over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys
from tests.ports import free_port


class StoreProcess:
    """``python -m services.value_store`` with settings of its own."""

    def __init__(self, folder: Path, keys: Keys, redis_url: str, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = folder / f"{self.port}.toml"
        self.log = folder / f"{self.port}.log"
        store = {
            "port": self.port,
            **{k: v for k, v in settings.items() if k not in ("total_steps", "train_batch_size")},
        }
        steps, batch = settings.get("total_steps", 50), settings.get("train_batch_size", 4)
        self.config.write_text(
            f'[run]\nname = "{keys.run}"\nmodel = "none"\nredis_url = "{redis_url}"\ntotal_steps = {steps}\n'
            f"train_batch_size = {batch}\nmax_staleness = 1\n[value_store]\n"
            + "".join(f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for k, v in store.items())
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.value_store", "--config", str(self.config)],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if ready:
            self.wait_ready()

    def wait_ready(self, deadline_s: float = 60.0) -> None:
        started = time.monotonic()
        while time.monotonic() - started < deadline_s:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"not ready after {deadline_s} s: {self.log.read_text()}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture
def store_process(tmp_path: Path, keys: Keys, redis_server: EmbeddedRedis) -> Iterator[StoreProcess]:
    one = StoreProcess(tmp_path, keys, redis_server.url)
    yield one
    one.stop()
