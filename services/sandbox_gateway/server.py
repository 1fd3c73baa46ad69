"""Runs the service behind uvicorn: start closed, serve, drain on SIGTERM, end with a telling exit code."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from services.sandbox_gateway import host
from services.sandbox_gateway.faults import IsolationUnavailable
from services.sandbox_gateway.metrics import Metrics
from services.sandbox_gateway.pool import ZygotePool
from services.sandbox_gateway.view import find_interpreter
from singlestream.config import SandboxGatewayConfig

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("singlestream.sandbox")

DRAIN_GRACE_S = 10.0
"""Runs in progress get the longest time-out and this on top to finish."""


def resolve_slots(config: SandboxGatewayConfig) -> int:
    """Runs at a time, checked against the memory of this host or container.

    Raises:
        IsolationUnavailable: they do not fit; the text names the settings.
    """
    slots = config.slots or 2 * host.cores()
    if (shortfall := host.memory_shortfall(slots, config.memory_mb, host.memory_bytes())) is not None:
        raise IsolationUnavailable(shortfall)
    return slots


def make_pool(config: SandboxGatewayConfig, secret_path: Path | None, metrics: Metrics) -> ZygotePool:
    """The zygotes that the settings ask for, not yet started.

    Raises:
        SandboxFault: the sandbox's Python does not start.
    """
    return ZygotePool(
        find_interpreter(str(config.python or sys.executable)),
        config.preload,
        str(secret_path or "/etc/hosts"),
        min(config.slots or 2 * host.cores(), 2 * host.cores()),
        config.recycle_runs,
        config.recycle_s,
        lambda kind, reason: metrics.zygote_starts.labels(kind, reason).inc(),
    )


async def serve(config: SandboxGatewayConfig, secret_path: Path | None = None) -> None:
    """Run the gateway until SIGTERM or SIGINT.

    Args:
        config: its settings.
        secret_path: its configuration file; the canaries prove that no run can read it.

    Raises:
        IsolationUnavailable: the host cannot isolate.
        SandboxFault: no zygote came up, or one could not be replaced; another process may do better.
        OSError: the address cannot be bound.
    """
    slots = resolve_slots(config)
    _raise_descriptor_limit()
    metrics = Metrics()
    pool = make_pool(config, secret_path, metrics)
    starting = asyncio.create_task(pool.start())
    # The first zygote warms up, and its canaries run, while the web framework is imported: a restart costs the longer
    # of the two.
    for name in ("services.sandbox_gateway.app", "uvicorn"):
        await asyncio.to_thread(importlib.import_module, name)
    import uvicorn

    from services.sandbox_gateway.app import create_app
    from services.sandbox_gateway.service import SandboxService

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are handled below: uvicorn's way ends the process by the signal instead of returning."""
            yield

    try:
        service = SandboxService(config, slots, pool, metrics)
        server = Server(
            uvicorn.Config(
                create_app(service),
                host=config.host,
                port=config.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=int(config.max_timeout_s + DRAIN_GRACE_S),
            )
        )

        def stop(number: int) -> None:
            log.info("%s: %d runs in progress will finish", signal.Signals(number).name, service.running)
            service.drain()
            server.should_exit = True

        await starting
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        await _serve_until_failure(server, pool, config, slots)
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await pool.stop()


async def _serve_until_failure(
    server: uvicorn.Server, pool: ZygotePool, config: SandboxGatewayConfig, slots: int
) -> None:
    serving = asyncio.create_task(server.serve())
    keeping = asyncio.create_task(pool.keep())
    log.info("sandbox gateway on http://%s:%d: %d slots of %d MiB", config.host, config.port, slots, config.memory_mb)
    await asyncio.wait({serving, keeping}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    keeper_failed = keeping.done()
    try:
        await serving
    except SystemExit as error:  # uvicorn's way to say that it could not bind
        raise OSError(f"cannot listen on {config.host}:{config.port}") from error
    finally:
        if not keeper_failed:
            keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    if keeper_failed:
        keeping.result()


def _raise_descriptor_limit() -> None:
    """Six descriptors a run and one a connection: take what the host grants."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
