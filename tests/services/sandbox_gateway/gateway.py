"""Starts real gateways for the tests and looks at what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

SECRET = "hunter2-not-for-snippets"  # noqa: S105
"""In the gateway's environment and in a file that it can read; no output may ever hold it."""
START_DEADLINE_S = 60.0
SETTLE_DEADLINE_S = 30.0


class Gateway:
    """A gateway process of its own, on a port of its own.

    Args:
        settings: of the ``sandbox_gateway`` section.
        warm: whether to wait until every kind of zygote is ready.
    """

    def __init__(self, warm: bool = True, **settings: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.NamedTemporaryFile("w+", prefix="sandbox-gateway-", suffix=".log")  # noqa: SIM115
        environment = {
            **os.environ,
            "TEST_SECRET": SECRET,
            "SINGLESTREAM_SANDBOX_GATEWAY__PORT": str(self.port),
            **{f"SINGLESTREAM_SANDBOX_GATEWAY__{key.upper()}": str(value) for key, value in settings.items()},
        }
        environment.pop("SINGLESTREAM_CONFIG", None)
        command = [sys.executable, "-m", "services.sandbox_gateway"]
        root = Path(__file__).parents[3]
        self.process: Any = subprocess.Popen(command, cwd=root, env=environment, stdout=self.log, stderr=self.log)
        try:
            self._wait_ready(warm)
        except BaseException:
            self.process.kill()
            self.process.wait()
            self.log.close()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=90)

    @classmethod
    def attach(cls, pid: int, url: str) -> Gateway:
        """A gateway that something else has started, such as a container; its secret must be :data:`SECRET`, too."""
        attached = cls.__new__(cls)
        attached.url, attached.port = url, int(url.rsplit(":", 1)[1])
        attached.process = psutil.Process(pid)
        attached.log = tempfile.NamedTemporaryFile("w+", prefix="sandbox-gateway-", suffix=".log")  # noqa: SIM115
        attached._wait_ready(warm=True)
        attached.http = httpx.Client(base_url=url, timeout=90)
        return attached

    def detach(self) -> None:
        """Leave it running."""
        self.http.close()
        self.log.close()

    def _wait_ready(self, warm: bool) -> None:
        until_s = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < until_s:
            if isinstance(self.process, subprocess.Popen) and self.process.poll() is not None:
                raise AssertionError(f"the gateway ended with {self.process.returncode}: {self.logged()}")
            try:
                answer = httpx.get(f"{self.url}/readyz", timeout=5)
                if answer.status_code == 200 and not (warm and "starting" in answer.json()["zygotes"].values()):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"the gateway was not ready after {START_DEADLINE_S} s: {self.logged()}")

    def logged(self) -> str:
        return Path(self.log.name).read_text()[-4000:]

    def run(self, code: str, **request: Any) -> dict[str, Any]:
        """Execute and expect an outcome."""
        answer = self.http.post("/v1/execute", json={"code": code, **request})
        assert answer.status_code == 200, (answer.status_code, answer.text, self.logged())
        result: dict[str, Any] = answer.json()
        return result

    def metric(self, name: str) -> float:
        """A metric summed over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def open_files(self) -> int:
        """Descriptors of the gateway, connections left out."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        count = 0
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += not os.readlink(entry).startswith("socket:")
        return count

    def memory_bytes(self) -> int:
        """Resident memory of the gateway itself."""
        return psutil.Process(self.process.pid).memory_info().rss

    def footprint(self) -> tuple[int, int]:
        """Processes below the gateway and its open files, once they stay the same: spare jails may still be opened."""
        until_s = time.monotonic() + SETTLE_DEADLINE_S
        found, since_s = (0, 0), time.monotonic()
        while time.monotonic() - since_s < 0.3:
            assert time.monotonic() < until_s, f"the gateway does not come to rest: {found}"
            if (now := (len(self.descendants()), self.open_files())) != found:
                found, since_s = now, time.monotonic()
            time.sleep(0.01)
        return found

    def wait_idle(self, footprint: tuple[int, int]) -> None:
        """Wait until no run is left; asserts that no process and no open file of one stays."""
        until_s = time.monotonic() + SETTLE_DEADLINE_S
        while (now := (len(self.descendants()), self.open_files())) != footprint:
            assert time.monotonic() < until_s, (now, footprint, [str(process) for process in self.descendants()])
            time.sleep(0.01)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.log.close()
