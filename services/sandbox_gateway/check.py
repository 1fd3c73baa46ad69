"""``python -m services.sandbox_gateway.check [--config FILE]``: whether this host can isolate, and what it lacks."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from services.sandbox_gateway import host
from services.sandbox_gateway.faults import IsolationUnavailable, SandboxFault
from services.sandbox_gateway.metrics import Metrics
from services.sandbox_gateway.policy import policy_version
from services.sandbox_gateway.privileges import CannotDrop, become_unprivileged, needed_paths
from services.sandbox_gateway.server import make_pool, resolve_slots
from services.sandbox_gateway.settings import config_file, load_settings
from singlestream.config import SandboxGatewayConfig
from singlestream.errors import ConfigError


def check(config: SandboxGatewayConfig, secret_path: Path | None = None, say: Callable[[str], None] = print) -> bool:
    """Try everything that the gateway would need, and say how it went, a line each.

    Args:
        config: the gateway's settings.
        secret_path: a file that this process can read and no run may; None takes a system file.
        say: where the lines go.

    Returns:
        Whether the gateway would start here.
    """
    bubblewrap = shutil.which("bwrap")
    say(f"{'ok  ' if bubblewrap else 'FAIL'} bubblewrap: {bubblewrap or 'not installed: apt-get install bubblewrap'}")
    say(f"ok   kernel: {platform.release()}, seccomp policy {policy_version()}")
    cores, memory = host.cores(), host.memory_bytes() >> 20
    try:
        slots = resolve_slots(config)
        say(f"ok   size: {slots} slots of {config.memory_mb} MiB on {cores} cores and {memory} MiB")
        fits = True
    except IsolationUnavailable as error:
        say(f"FAIL size: {error}")
        fits = False
    return asyncio.run(_check_zygotes(config, secret_path, say)) and fits and bubblewrap is not None


async def _check_zygotes(config: SandboxGatewayConfig, secret_path: Path | None, say: Callable[[str], None]) -> bool:
    begun_s = time.monotonic()
    try:
        pool = make_pool(config, secret_path, Metrics())
        try:
            await pool.start(every_kind=True)
        finally:
            await pool.stop()
    except SandboxFault as error:
        say(f"FAIL isolation: {error}")
        return False
    kinds = ", ".join(tier.name for tier in pool.tiers)
    say(f"ok   isolation: all canaries behaved in every zygote ({kinds}) after {time.monotonic() - begun_s:.1f} s")
    return True


def main() -> int:
    """Check this host; the exit code is 0 if the gateway would start, else 78 (EX_CONFIG)."""
    parser = argparse.ArgumentParser(prog="python -m services.sandbox_gateway.check", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="the run's TOML file; default: SINGLESTREAM_CONFIG")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    path = config_file(arguments.config)
    try:
        config = load_settings(path)
        become_unprivileged(needed_paths(path, str(config.python or sys.executable)))
        return os.EX_OK if check(config, path) else os.EX_CONFIG
    except (ConfigError, CannotDrop) as error:
        print(f"FAIL {error}")
        return os.EX_CONFIG


if __name__ == "__main__":
    sys.exit(main())
