"""``python -m services.rollout [--config FILE] [--no-ray | --node]``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

log = logging.getLogger("services.rollout")


def main(argv: list[str] | None = None) -> int:
    """Run the service; returns the exit code: 0 after an orderly stop, 1 if an engine failed, 2 for a wrong setting."""
    parser = argparse.ArgumentParser(prog="python -m services.rollout", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file of the run; else SINGLESTREAM_CONFIG names it")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-ray", action="store_true", help="one replica in this process, without Ray Serve")
    how.add_argument("--node", action="store_true", help="a Ray node with room for one replica, at rollout.ray_address")
    options = parser.parse_args(argv)

    from services.rollout.process_env import guarded
    from singlestream.config import load_config
    from singlestream.errors import ConfigError, SinglestreamError
    from singlestream.telemetry import setup_logging

    setup_logging("rollout")
    try:
        config = guarded(load_config(options.config))
        if options.no_ray:
            from services.rollout.process_env import apply_engine_variables

            apply_engine_variables(config)
            from services.rollout.single import run_single

            run_single(config)
        if options.node:
            from services.rollout.node import run_node

            return run_node(config)
        from services.rollout.serve import run_serve

        return run_serve(config)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except SinglestreamError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
