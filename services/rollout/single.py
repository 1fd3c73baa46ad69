"""One replica in this process, without Ray: for debugging, and for clusters that do not want Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import NoReturn

import uvicorn

from services.rollout.api import create_app
from services.rollout.replica import Replica
from singlestream.config import Config
from singlestream.errors import SinglestreamError

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn, leaving the signals to `run_single`."""

    def install_signal_handlers(self) -> None:
        """The handler of this process hands episodes over first."""

    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Likewise, in newer versions."""
        return contextlib.nullcontext()


async def _serve(config: Config) -> NoReturn:
    replica = Replica(config)
    settings = uvicorn.Config(
        create_app(lambda: replica), config.rollout.host, config.rollout.port, log_config=None, access_log=False
    )
    server = _Server(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    http = asyncio.create_task(server.serve(), name="http")
    code = 0
    try:
        stop = asyncio.create_task(stopping.wait())
        start = asyncio.create_task(replica.start())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            # no lease has been taken, and a starting engine cannot be interrupted: its processes end with this one
            log.info("stopped while the engine was starting")
            _exit(0)
        start.result()
        work = asyncio.create_task(replica.wait())
        await asyncio.wait({stop, work, http}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if work.done() and not stopping.is_set():
            work.result()
    except SinglestreamError as error:
        log.error("%s; this process ends, and its supervisor starts another", error)
        code = 1
    except BaseException:  # the boundary of the process; the HTTP server ends it so where its port is taken
        log.exception("this process ends")
        code = 1
    finally:
        await replica.stop()
        server.should_exit = True
        await asyncio.wait({http}, timeout=10.0)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End the process without waiting for its threads: an engine's start, or a grader, may hang in one for good."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_single(config: Config) -> NoReturn:
    """Run until SIGTERM or SIGINT, then end the process: 0, or 1 if the engine or a wait for it has failed."""
    asyncio.run(_serve(config))
