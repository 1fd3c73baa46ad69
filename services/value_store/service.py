"""The process: an HTTP server and the background loops, ending together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from services.value_store import loops
from services.value_store.app import make_app
from services.value_store.ending import end
from services.value_store.store import Store
from singlestream.config import Config
from singlestream.errors import ConfigError
from singlestream.streams.connection import connect

log = logging.getLogger(__name__)

SHUTDOWN_S = 5
"""Requests under way get so long at SIGTERM."""
KEEP_ALIVE_S = 75
"""Idle connections outlive those of clients (httpx: 5 s), so that none is closed as it is used again."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again after its own shutdown, before the loops have ended
        yield


def serve(config: Config) -> None:
    """Run the store until SIGTERM or SIGINT.

    Raises:
        ConfigError: it would listen off loopback without tokens.
        Fenced: another store has taken over.
        DeadlineExceeded: Redis stayed away too long.
    """
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        runner.run(run(config))


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or the loop sets no TCP_NODELAY
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
        return listening
    except OSError as error:
        raise ConfigError(f"value_store.host and value_store.port: {host}:{port}: {error.strerror}") from error


async def run(config: Config) -> None:
    """`serve`, inside a running event loop."""
    settings = config.value_store
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # Bound before the fence is taken: a second start on a port in use must not depose the store that listens there.
    listening = _bind(settings.host, settings.port)
    redis = connect(config.run.redis_url)
    store = Store(config, redis)
    server = _Server(
        uvicorn.Config(
            make_app(store, settings),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )
    tasks = [
        asyncio.create_task(work, name=name)
        for name, work in (
            ("keep_ready", store.keep_ready()),
            ("follow_updates", loops.follow_updates(store)),
            ("follow_results", loops.follow_results(store)),
            ("follow_versions", loops.follow_versions(store)),
            ("follow_trajectories", loops.follow_trajectories(store)),
            ("issue_leases", loops.issue_leases(store)),
        )
    ]
    http = asyncio.create_task(server.serve(sockets=[listening]), name="http")
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
    log.info("listening on http://%s:%d", settings.host, settings.port)
    try:
        done, _ = await asyncio.wait([http, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a loop that has ended has failed: its error ends the process
    finally:
        server.should_exit = True
        await end(tasks)
        await asyncio.wait([http], timeout=2 * SHUTDOWN_S)
        for task in (*tasks, http):  # only the first error ends the process; the others follow from it
            if task.done() and not task.cancelled():
                task.exception()
        await redis.aclose()
