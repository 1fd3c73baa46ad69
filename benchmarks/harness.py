"""What every benchmark shares: its command line, the machine's description, and the JSON it writes.

The JSON is ``{"benchmark", "commit", "machine", "figures": [{"name", "value", "unit", "reference"}]}``; ``reference``
says what the figure was measured against in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Args:
        name: stable name, for comparisons over commits.
        value: median over the repetitions unless the name says otherwise.
        unit: ``ms``, ``tokens/s``, ``ratio``, …
        reference: what it was compared with, in the same run; empty for a plain measurement.
    """

    name: str
    value: float
    unit: str
    reference: str = ""


def machine() -> dict[str, str | int]:
    """The hardware and system that the figures belong to."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kb / 2**20),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit measured, with ``-dirty`` where the tree differs from it."""
    reply = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return reply.stdout.strip() or "unknown"


def run(name: str, measure: Callable[[bool], list[Figure]], argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print a table, and write the JSON if asked.

    Args:
        name: name of the benchmark.
        measure: takes ``quick`` and returns the figures.
        argv: command line; None takes the process's.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: to see that it runs, not to quote")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    figures = measure(options.quick)
    report = {"benchmark": name, "commit": commit(), "machine": machine(), "figures": [asdict(f) for f in figures]}
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        print(f"{figure.name:<{width}}  {figure.value:>12.4g} {figure.unit:<10} {figure.reference}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
