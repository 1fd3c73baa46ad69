"""The learner's optimizer step beside a bare transformers + AdamW loop and TRL's GRPO trainer.

``python -m benchmarks.learner [--quick]``. Same model, tokens and machine. TRL is measured where
``SINGLESTREAM_TRL_PYTHON`` names an interpreter that has it (an environment of its own: ``pip install trl``). Ratios
above 1 mean that ours is faster. Every way runs with the layout that suits it best. Threads: ``OMP_NUM_THREADS`` (2),
waiting passively, since a busy machine punishes spinning threads more than it tells about a step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, run

MALLOC_BYTES = str(16 << 30)
"""Keeps freed memory in the process: page faults cost half of a CPU step of the 135 M model. For every way alike."""

TINY = {
    "model": "tiny", "batch": 128, "prompt_tokens": 25, "response_tokens": [8, 60], "micro_batch_tokens": 8192,
    "bare_packed_tokens": 512, "trl_micro_batch": 128,
}  # fmt: skip
SMOLLM2 = {
    "model": "smollm2", "batch": 32, "prompt_tokens": 48, "response_tokens": [16, 80], "micro_batch_tokens": 1024,
    "bare_packed_tokens": 512, "trl_micro_batch": 8,
}  # fmt: skip
"""Rows of the bare packed way are short: its mask grows with their square."""
DEADLINE_S = 1800


def worker(way: str, settings: dict[str, Any], python: str = sys.executable) -> dict[str, float]:
    """Run one way in a process of its own; returns what it printed."""
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    if not way.startswith("peak"):  # kept memory would count as used
        environment |= {"MALLOC_MMAP_THRESHOLD_": MALLOC_BYTES, "MALLOC_TRIM_THRESHOLD_": MALLOC_BYTES}
    environment |= os.environ
    root = Path(__file__).parent.parent
    command = [python, "-m", "benchmarks.learner_workers", way, json.dumps(settings)]
    reply = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    if reply.returncode:
        raise SystemExit(f"{way} failed:\n{reply.stderr[-4000:]}")
    measured: dict[str, float] = json.loads(reply.stdout.splitlines()[-1])
    return measured


def compare(settings: dict[str, Any], trl_python: str | None) -> list[Figure]:
    """Seconds of a step each way, and the faster of our layouts relative to the others."""
    name = settings["model"]
    ways = ["ours-packed", "bare-packed", "ours-padded", "bare-padded"] + (["trl"] if trl_python else [])
    seconds = {}
    for way in ways:
        python = trl_python if way == "trl" and trl_python else sys.executable
        seconds[way] = worker(way, settings, python)["median_s"]
    figures = [Figure(f"{name}_step_{way}_s", value, "s") for way, value in seconds.items()]
    best = min(("ours-packed", "ours-padded"), key=seconds.__getitem__)
    for way in (way for way in ways if not way.startswith("ours")):
        label = f"{name}_step_vs_{way.replace('-', '_')}"
        figures.append(Figure(label, seconds[way] / seconds[best], "ratio", f"{way} over {best}, same tokens, fp32"))
    return figures


def measure(quick: bool) -> list[Figure]:
    """All figures; the small model alone with ``quick``."""
    trl_python = os.environ.get("SINGLESTREAM_TRL_PYTHON")
    figures = compare({**TINY, "repetitions": 5 if quick else 15}, trl_python)
    if not quick:
        figures += compare({**SMOLLM2, "repetitions": 2}, trl_python)
    return figures


if __name__ == "__main__":
    run("learner", measure)
