"""The learner's side of weights over HTTP, as the learner itself puts it together, and a wire that breaks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from services.learner.metrics import Metrics, MetricsServer
from services.learner.publisher import Publisher
from services.learner.redis_link import RedisLink, Status
from services.learner.weights_http import WeightFiles
from singlestream.config import Config
from singlestream.contracts import PolicyVersion
from singlestream.streams import Keys, newest_version
from tests.ports import free_port

TOKEN = "a-token"  # noqa: S105


class Source:
    """Rank 0's publisher, HTTP server and Redis, without a model under training.

    Args:
        folder: the learner's machine: its memory volume.
        redis_url: of a real Redis.
        run: name of the run.
        url: what the versions name; None: this server itself.
        dtype: of the weights.
    """

    def __init__(self, folder: Path, redis_url: str, run: str, url: str | None = None, dtype: str = "bfloat16") -> None:
        port = free_port()
        self.config = Config(
            run={
                "name": run,
                "model": folder,
                "total_steps": 1,
                "redis_url": redis_url,
                "weights_dir": folder / "learner",
                "weights_token": TOKEN,
                "engine_dtype": dtype,
            },
            learner={"metrics_port": port, "weights_url": url or f"http://127.0.0.1:{port}"},
        )
        self.port = port
        self.files = WeightFiles.of(self.config)
        self.status = Status(total_steps=1)
        self.server = MetricsServer(Metrics(), self.status, "127.0.0.1", port, self.files)
        self.link = RedisLink(redis_url, Keys(run), self.status, 20.0)
        self.link.call(self.link.streams.take_over, "the fence")
        self.publisher = Publisher(self.config, 1, self.link, self.files)

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> PolicyVersion:
        """Publish a version as the learner does; returns it as replicas read it on another machine."""
        dtype = getattr(torch, self.config.run.engine_dtype)
        whole = [(name, tensor.detach().to(dtype).contiguous()) for name, tensor in tensors.items()]
        self.publisher.announce(self.publisher.snapshot(whole, version), float(version), 0.0)
        return self.newest()

    def newest(self) -> PolicyVersion:
        """The last version announced, as replicas on another machine read it."""
        announced = self.link.call(lambda: newest_version(self.link.redis, Keys(self.config.run.name)), "the version")
        assert announced is not None
        return elsewhere(announced)

    def close(self) -> None:
        self.publisher.close()
        self.server.close()
        self.link.close()


def elsewhere(version: PolicyVersion) -> PolicyVersion:
    """The same version seen from a machine on which the learner's folder does not exist."""
    manifest = version.manifest.model_copy(update={"path": f"/another-machine{version.manifest.path}"})
    return version.model_copy(update={"manifest": manifest})


def replica_run(source: Source, folder: Path) -> Any:
    """Section ``run`` of a replica on another machine, whose memory volume is ``folder``."""
    return source.config.run.model_copy(update={"weights_dir": folder})


class BreakingWire:
    """Forwards connections to a port. Each gets the next of ``cuts``: bytes towards the client until it is cut."""

    def __init__(self, cuts: list[int]) -> None:
        self.target = 0
        self.cuts, self.connections = cuts, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            left = self.cuts.pop(0) if self.cuts else 1 << 40
            threading.Thread(target=self._carry, args=(client, left), daemon=True).start()

    def _carry(self, client: socket.socket, left: int) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as server:
            server.sendall(client.recv(65536))
            while left and (part := server.recv(min(65536, left))):
                client.sendall(part)
                left -= len(part)

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def source(folder: Path, redis_url: str, run: str, **options: Any) -> Iterator[Source]:
    one = Source(folder, redis_url, run, **options)
    try:
        yield one
    finally:
        one.close()


async def until(true: Any, what: str, deadline_s: float = 30.0) -> None:
    """Wait for a condition, with a named deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            while not true():
                await asyncio.sleep(0.02)
    except TimeoutError as error:
        raise AssertionError(f"waited {deadline_s:.0f} s for {what}") from error
