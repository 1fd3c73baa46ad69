"""Starts real gateways for the tests and looks at what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.ports import free_port

SECRET = "hunter2-not-for-snippets"  # noqa: S105
"""In the gateway's environment and in its :attr:`Gateway.secret_file`; no output may ever hold it."""
COMMAND = (sys.executable, "-m", "services.sandbox_gateway")
START_DEADLINE_S = 120.0
SETTLE_DEADLINE_S = 60.0
NAMED = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'snippet', 0, 0, 0)\n"
"""Lets the tests tell a run from the zygote and from the jails that wait for a program."""


def name_of(process: psutil.Process) -> str:
    """Empty where it has ended."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def limit_descriptors(process: psutil.Process, count: int) -> None:
    """Set the soft limit of a process: as its own user, as root may lack CAP_SYS_RESOURCE."""
    user, group = process.uids().real, process.gids().real
    subprocess.run(["prlimit", f"--pid={process.pid}", f"--nofile={count}:"], user=user, group=group, check=True)


class Gateway:
    """A gateway process of its own, on a port of its own.

    Args:
        warm: whether to wait until every kind of zygote is ready.
        command: starts it.
        settings: of the ``sandbox_gateway`` section.
    """

    host = "127.0.0.1"
    """The host's address, as the gateway sees it."""
    beside: tuple[str, ...] = ()
    """Goes before a command that shall run in the gateway's network."""

    def __init__(self, warm: bool = True, command: Sequence[str] = COMMAND, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.NamedTemporaryFile("w+", prefix="sandbox-gateway-", suffix=".log")  # noqa: SIM115
        environment = {
            **os.environ,
            "TEST_SECRET": SECRET,
            "SINGLESTREAM_SANDBOX_GATEWAY__PORT": str(self.port),
            **{f"SINGLESTREAM_SANDBOX_GATEWAY__{key.upper()}": str(value) for key, value in settings.items()},
        }
        environment.pop("SINGLESTREAM_CONFIG", None)
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
        self._leave_secret()

    @classmethod
    def attach(cls, pid: int, url: str, host: str) -> Gateway:
        """A gateway that something else has started, such as a container; its secret must be :data:`SECRET`, too."""
        attached = cls.__new__(cls)
        attached.url, attached.port = url, int(url.rsplit(":", 1)[1])
        attached.host, attached.beside = host, ("nsenter", f"--net=/proc/{pid}/ns/net")
        attached.process = psutil.Process(pid)
        attached.log = tempfile.NamedTemporaryFile("w+", prefix="sandbox-gateway-", suffix=".log")  # noqa: SIM115
        attached._wait_ready(warm=True)
        attached.http = httpx.Client(base_url=url, timeout=90)
        attached._leave_secret()
        return attached

    def _leave_secret(self) -> None:
        """Put :data:`SECRET` where the gateway sees it, in a container too."""
        self.secret_path = f"/tmp/gateway-secret-{self.port}"
        self.secret_file = Path(f"/proc/{self.process.pid}/root{self.secret_path}")
        self.secret_file.write_text(SECRET)

    def detach(self) -> None:
        """Leave it running."""
        self.secret_file.unlink()
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

    def zygotes(self) -> list[psutil.Process]:
        """The warm Pythons, oldest first."""
        found = []
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = process.parent()
                if parent is not None and name_of(parent) == "bwrap" != name_of(process):
                    found.append(process)
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def runs(self) -> list[psutil.Process]:
        """Runs in progress that have come to their :data:`NAMED`, oldest first."""
        found = [process for process in self.descendants() if name_of(process) == "snippet"]
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def wait_for_runs(self, count: int) -> list[psutil.Process]:
        """:meth:`runs`, as soon as there are so many."""
        until_s = time.monotonic() + SETTLE_DEADLINE_S
        while len(found := self.runs()) < count:
            assert time.monotonic() < until_s, f"{len(found)} of {count} runs have begun"
            time.sleep(0.01)
        return found

    def wait_for_metric(self, name: str, value: float) -> None:
        until_s = time.monotonic() + SETTLE_DEADLINE_S
        while (now := self.metric(f"singlestream_sandbox_{name}")) != value:
            assert time.monotonic() < until_s, f"{name} is {now}"
            time.sleep(0.01)

    @contextlib.contextmanager
    def waiting(self, **request: object) -> Iterator[None]:
        """A caller of its own with this request, who goes away at the end of the block."""
        body = json.dumps(request).encode()
        with socket.create_connection(("127.0.0.1", self.port)) as caller:
            caller.sendall(b"POST /v1/execute HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            yield

    @contextlib.contextmanager
    def holding(self, runs: int, slots: int, **request: object) -> Iterator[None]:
        """So many sleeping runs, which hold so many slots until the end of the block and not a moment longer."""
        with contextlib.ExitStack() as callers:
            for _ in range(runs):
                callers.enter_context(self.waiting(code="import time; time.sleep(60)", timeout_s=60, **request))
            self.wait_for_metric("used_slots", slots)
            yield
        self.wait_for_metric("used_slots", 0)

    def open_files(self) -> int:
        """Descriptors of the gateway and its zygotes, lines to jails included, connections of callers left out."""
        proc = Path(f"/proc/{self.process.pid}")
        lines = {line.split()[6] for line in (proc / "net/unix").read_text().splitlines()[1:]}  # inodes
        count = 0
        for entry in (proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                kind, _, inode = os.readlink(entry).partition(":")
                count += kind != "socket" or inode.strip("[]") in lines
        for zygote in self.zygotes():
            with contextlib.suppress(psutil.NoSuchProcess):
                count += zygote.num_fds()
        return count

    def memory_bytes(self) -> int:
        """Resident memory of the gateway and its zygotes; what runs and jails share with theirs is not counted."""
        return sum(p.memory_info().rss for p in (psutil.Process(self.process.pid), *self.zygotes()))

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
        Path(self.secret_path).unlink(missing_ok=True)
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
