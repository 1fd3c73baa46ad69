"""Starts the services in order, keeps them alive, and stops everything."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from redis.asyncio import Redis

from singlestream.config import Config
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import ConfigError
from singlestream.streams import Keys, connect
from singlestream.supervisor.child import Child
from singlestream.supervisor.services import specs

T = TypeVar("T")

LEAST_FREE_BYTES = 256 << 20
"""A short run's logs, values and ledger."""


def claim(config: Config, held: contextlib.ExitStack) -> None:
    """Make the run's two folders and lock them until ``held`` is closed. Raises `ConfigError` if another run has one.

    The weights' folder goes by the run's name alone, so it is what two checkouts of one demo would share.
    """
    for folder in (config.run.dir, config.run.weights_path):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        held.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"run {config.run.name!r} is already up on this machine: it holds {folder}. "
                "Stop it, or give this run another run.name"
            ) from error


def check_room(folder: Path) -> None:
    """Raise `ConfigError` where Redis' file and the logs would soon find no room: every service would stall."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < LEAST_FREE_BYTES:
        raise ConfigError(
            f"{folder}: {free_bytes >> 20} MiB are free on its disk. At least {LEAST_FREE_BYTES >> 20} MiB are needed, "
            "and 12 bytes a parameter for each checkpoint: make room, or set run.runs_dir"
        )


def check_ports(config: Config) -> None:
    """Raise `ConfigError` if a service's port is taken: what answers there would be taken for this run's service."""
    places = {f"{name}.port": getattr(config, name) for name in ("sandbox_gateway", "value_store", "rollout")}
    addresses = {key: (service.host, service.port) for key, service in places.items()}
    addresses["learner.metrics_port"] = (config.learner.metrics_host, config.learner.metrics_port)
    for key, (host, port) in addresses.items():
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                variable = f"SINGLESTREAM_{key.replace('.', '__').upper()}"
                remedy = f"; if another run has it, set another port in the file or in {variable}"
                raise ConfigError(f"{key}: cannot listen on {host}:{port}: {error.strerror}{remedy}") from error


class Supervisor:
    """All services of one run on this machine; use as an asynchronous context manager.

    Args:
        config: settings of the run.
        config_path: the file they came from; the services read it themselves.
        say: receives one line a noteworthy event.
        fresh: whether what an earlier run of this name left in `RunConfig.dir` is deleted first.

    Raises:
        ConfigError: the run is already up, its model is missing, a port is taken, or the disk is full.
    """

    def __init__(
        self, config: Config, config_path: Path, say: Callable[[str], None] = print, fresh: bool = False
    ) -> None:
        self.config, self.say, self.fresh = config, say, fresh
        self.keys = Keys(config.run.name)
        self.server = EmbeddedRedis(config.run.dir / "redis")
        self.redis: Redis = connect(self.server.url)
        logs = config.run.dir / "logs"
        self._stages = [
            [Child(spec, logs) for spec in stage] for stage in specs(config, config_path, self.server, self.redis)
        ]
        self.children = {child.spec.name: child for stage in self._stages for child in stage}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._held = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        """Start everything and wait until each service is ready; on failure everything is stopped again."""
        run = self.config.run
        if not (run.model / "config.json").exists():
            raise ConfigError(f"run.model: {run.model} is no Hugging Face model folder; `make setup` makes the demo's")
        with contextlib.ExitStack() as held:
            claim(self.config, held)
            check_ports(self.config)
            check_room(run.dir)
            if self.fresh:
                for left in (*run.dir.iterdir(), *run.weights_path.iterdir()):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            for folder in (run.dir / "logs", run.dir / "redis"):
                folder.mkdir(exist_ok=True)
            self._held = held.pop_all()
        try:
            for stage in self._stages:
                for child in stage:
                    self._tasks[child.spec.name] = asyncio.create_task(child.run(), name=child.spec.name)
                await self.watch(self._ready(stage))
        except BaseException:
            await self.stop()
            raise
        return self

    async def _ready(self, stage: list[Child]) -> None:
        async with asyncio.TaskGroup() as group:
            for child in stage:
                group.create_task(child.wait_ready(self.say))

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``, unless a service gives up first. Raises what either raises."""
        main = asyncio.ensure_future(work)
        try:
            while not main.done():
                living = {task for task in self._tasks.values() if not task.done()}
                await asyncio.wait({main, *living}, return_when=asyncio.FIRST_COMPLETED)
                for task in self._tasks.values():
                    if task.done() and not main.done():
                        task.result()  # raises ServiceError if that service gave up
            return await main
        finally:
            main.cancel()

    @property
    def learner_completed(self) -> bool:
        """Whether the learner has trained all of its steps."""
        return self.children["learner"].completed

    async def stop(self) -> None:
        """Stop the services in reverse order, Redis last, and remove the weights from memory."""
        self.say("stopping the services")
        for stage in reversed(self._stages):
            await asyncio.gather(*(child.stop() for child in stage))
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self.redis.aclose()
        shutil.rmtree(self.config.run.weights_path, ignore_errors=True)
        self._held.close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        await self.stop()
