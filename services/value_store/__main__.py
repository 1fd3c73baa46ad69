"""``python -m services.value_store``: the value store of one run."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def main() -> int:
    """Run until SIGTERM. Exit codes: 0 stopped, 2 bad settings, 3 another store has taken over, 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m services.value_store", description=__doc__)
    parser.add_argument("--config", type=Path, help="the run's TOML file (default: SINGLESTREAM_CONFIG)")
    options = parser.parse_args()

    from singlestream.config import load_config
    from singlestream.errors import ConfigError, Fenced, SinglestreamError
    from singlestream.telemetry import setup_logging

    setup_logging("value_store")
    log = logging.getLogger("services.value_store")
    try:
        from services.value_store.service import serve

        serve(load_config(options.config))
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except Fenced as error:
        log.error("%s", error)
        return 3
    except SinglestreamError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
