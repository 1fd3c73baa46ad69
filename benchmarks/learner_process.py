"""One way of making the learner's steps, in a process of its own: so that none inherits another's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DEADLINE_S = 1800


def worker(
    module: str, way: str, settings: dict[str, Any], python: str = sys.executable, **environment: str
) -> dict[str, float]:
    """Run ``python -m module way settings``; returns the JSON object that it printed last.

    Args:
        module: has the ways.
        way: one of them.
        settings: of it.
        python: interpreter.
        environment: added to this process', which goes before the threads set here (two, waiting passively).
    """
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, **environment}
    command = [python, "-m", module, way, json.dumps(settings)]
    root = Path(__file__).parent.parent
    reply = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    if reply.returncode:
        raise SystemExit(f"{way} failed:\n{reply.stderr[-4000:]}")
    measured: dict[str, float] = json.loads(reply.stdout.splitlines()[-1])
    return measured
