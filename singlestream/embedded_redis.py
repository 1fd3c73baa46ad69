"""A private Redis server with a folder, a socket and an append-only file of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import redis

from singlestream.errors import ConfigError, DeadlineExceeded

SOCKET_PATH_BYTES = 107
"""Linux takes no longer one (unix(7))."""


def find_server() -> str:
    """Path of a ``redis-server`` binary. Raises `ConfigError` where there is none."""
    path = shutil.which("redis-server")
    if path is None:
        raise ConfigError("no redis-server on this machine: run `make setup`, or install the package redis-server")
    return path


class EmbeddedRedis:
    """One server, reachable at `url` over a Unix socket only.

    Args:
        folder: holds the append-only file, the log and the socket; made if missing. Data in it is loaded again.
        fsync: ``always`` loses nothing that was answered (docs/design.md); ``everysec`` may lose the last second.
    """

    def __init__(self, folder: Path, fsync: str = "always") -> None:
        self.folder, self.fsync = folder.resolve(), fsync
        self.socket = self.folder / "redis.sock"
        self.log = self.folder / "redis.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address for `singlestream.streams.connect`."""
        return f"unix://{self.socket}"

    def command(self) -> list[str]:
        """The server's command line; it logs to standard output.

        Raises `ConfigError` where there is no server, or the folder's path is too long.
        """
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES:
            raise ConfigError(f"{self.socket}: longer than a socket's path may be; choose a shorter run.runs_dir")
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": self.fsync,
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [find_server(), *(part for key, value in settings.items() for part in (f"--{key}", value))]

    def start(self, deadline_s: float = 60.0) -> None:
        """Start the server and wait until it answers; one that does not is ended.

        Raises `DeadlineExceeded` or `ConfigError`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            self.wait(deadline_s)
        except BaseException:
            self.kill()
            raise

    def wait(self, deadline_s: float) -> None:
        """Wait until the server answers and has loaded its file."""
        started = time.monotonic()
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.BusyLoadingError) as error:
                    if self.process is not None and self.process.poll() is not None:
                        raise ConfigError(f"redis-server ended at once; see {self.log}") from error
                    if time.monotonic() - started > deadline_s:
                        raise DeadlineExceeded(f"the embedded Redis at {self.socket}", deadline_s) from error
                    time.sleep(0.02)

    def stop(self) -> None:
        """End the server after it has written its file."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def kill(self) -> None:
        """End the server as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
