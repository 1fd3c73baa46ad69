"""Starts the services in order, keeps them alive, and stops everything."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from redis.asyncio import Redis

from singlestream.config import Config
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import ConfigError
from singlestream.streams import Keys, connect
from singlestream.supervisor.child import Child
from singlestream.supervisor.services import specs

T = TypeVar("T")


class Supervisor:
    """All services of one run on this machine; use as an asynchronous context manager.

    Args:
        config: settings of the run.
        config_path: the file they came from; the services read it themselves.
        say: receives one line a noteworthy event.

    Raises:
        ConfigError: the run is already up, or its model is missing.
    """

    def __init__(self, config: Config, config_path: Path, say: Callable[[str], None] = print) -> None:
        self.config, self.say = config, say
        self.keys = Keys(config.run.name)
        self.server = EmbeddedRedis(config.run.dir / "redis")
        self.redis: Redis = connect(self.server.url)
        logs = config.run.dir / "logs"
        self._stages = [
            [Child(spec, logs) for spec in stage] for stage in specs(config, config_path, self.server, self.redis)
        ]
        self.children = {child.spec.name: child for stage in self._stages for child in stage}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lock: IO[str] | None = None

    async def __aenter__(self) -> Self:
        """Start everything and wait until each service is ready; on failure everything is stopped again."""
        run = self.config.run
        if not (run.model / "config.json").exists():
            raise ConfigError(f"run.model: {run.model} is no Hugging Face model folder; `make setup` makes the demo's")
        for folder in (run.dir / "logs", run.dir / "redis", run.weights_path):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = (run.dir / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(f"run {run.name!r} is already up in {run.dir}") from error
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
        for stage in reversed(self._stages):
            await asyncio.gather(*(child.stop() for child in stage))
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self.redis.aclose()
        shutil.rmtree(self.config.run.weights_path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        await self.stop()
