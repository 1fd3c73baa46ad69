"""Logs that say which service speaks, and the names that metrics share."""

from __future__ import annotations

import logging
import os
import sys
import time

METRIC_PREFIX = "singlestream"


class _LineFormatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


def setup_logging(service: str) -> None:
    """Send one line per event to standard error: UTC time, service, level, logger, text.

    Args:
        service: name of the service, with its rank or replica where there are several.

    ``SINGLESTREAM_LOG_LEVEL`` sets the level (INFO).
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(f"%(asctime)s {service} %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=os.environ.get("SINGLESTREAM_LOG_LEVEL", "INFO").upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
