"""``python -m services.sandbox_gateway [--config FILE]``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from services.sandbox_gateway.privileges import CannotDrop, become_unprivileged, needed_paths
from services.sandbox_gateway.settings import config_file, load_settings
from singlestream.config import SandboxGatewayConfig
from singlestream.errors import ConfigError


def main() -> int:
    """Start the gateway.

    Returns:
        Exit code: 0 after SIGTERM, 78 (EX_CONFIG) where the host or the settings must be mended first, 75 (EX_TEMPFAIL)
        where another start may do better.
    """
    parser = argparse.ArgumentParser(
        prog="python -m services.sandbox_gateway", description="Runs model-written Python in jails."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the run's TOML file; default: SINGLESTREAM_CONFIG, else built-in settings"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s sandbox_gateway %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    path = config_file(arguments.config)
    try:
        config = load_settings(path)
        become_unprivileged(needed_paths(path, str(config.python or sys.executable)))
    except (ConfigError, CannotDrop) as error:
        logging.error("refusing to start: %s", error)
        return os.EX_CONFIG
    return _serve(config, path)


def _serve(config: SandboxGatewayConfig, path: Path | None) -> int:
    # Imported here, so that as little as possible runs as root.
    from services.sandbox_gateway.faults import IsolationUnavailable, SandboxFault
    from services.sandbox_gateway.server import serve

    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):  # not on every platform; asyncio's own loop does the same, slower
        import uvloop

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(serve(config, path))
    except IsolationUnavailable as error:
        logging.error("refusing to start: %s", error)
        return os.EX_CONFIG
    except SandboxFault as error:
        logging.error("ending, to be started again: %s", error)
        return os.EX_TEMPFAIL
    except OSError as error:
        logging.error("%s", error)
        return os.EX_OSERR
    return 0


if __name__ == "__main__":
    sys.exit(main())
