"""The learner's optimizer step beside a bare transformers + AdamW loop and TRL's GRPO trainer.

``python -m benchmarks.learner [--quick]``. Same model, tokens, dtype and machine; ratios above 1 mean that ours is
faster. TRL is measured where ``SINGLESTREAM_TRL_PYTHON`` names an interpreter that has it (an environment of its own:
``pip install trl``). Ours is the faster of its two layouts. Threads: ``OMP_NUM_THREADS`` (2), waiting passively, since
a busy machine punishes spinning threads more than it tells about a step.

Responses of the main case are log-normal with p99 / median = 5 (log-sigma 0.69): response lengths have a long tail
(arXiv 2509.21009, 2605.30859). The width is our choice: the collection times quoted in docs/spo.md (112 against 486 s)
take a log-sigma of about 1.1, at which padding costs more. The other cases have lengths within a narrow range, where it
costs little: what stands there is the step alone.
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

SMOLLM2 = {"model": "smollm2", "dtype": "bfloat16", "batch": 32, "micro_batch_tokens": 1024, "bare_packed_tokens": 512}
CASES: dict[str, dict[str, Any]] = {
    "": {
        **SMOLLM2, "prompt_tokens": 24, "response_tokens": {"median": 64, "log_sigma": 0.69}, "trl_micro_batch": 4,
        "repetitions": 2,
    },
    "smollm2_even_": {
        **SMOLLM2, "prompt_tokens": 48, "response_tokens": {"low": 16, "high": 80}, "trl_micro_batch": 8,
        "repetitions": 2,
    },
    "tiny_": {
        "model": "tiny", "dtype": "float32", "batch": 128, "prompt_tokens": 25, "micro_batch_tokens": 8192,
        "bare_packed_tokens": 512, "response_tokens": {"low": 8, "high": 60}, "trl_micro_batch": 128, "repetitions": 15,
    },
}  # fmt: skip
"""Prefix of the figures → settings; the main case has none. Micro-batches hold about as many tokens for all; rows of
the bare packed way are shorter, as its mask grows with their square. ``tiny_`` is the demo's model and lengths."""
DEADLINE_S = 1800


def worker(module: str, way: str, settings: dict[str, Any], python: str = sys.executable) -> dict[str, float]:
    """Run one way of a module of workers in a process of its own; returns what it printed."""
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [python, "-m", module, way, json.dumps(settings)]
    root = Path(__file__).parent.parent
    reply = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    if reply.returncode:
        raise SystemExit(f"{way} failed:\n{reply.stderr[-4000:]}")
    measured: dict[str, float] = json.loads(reply.stdout.splitlines()[-1])
    return measured


def compare(prefix: str, settings: dict[str, Any], trl_python: str | None) -> list[Figure]:
    """Seconds and peak memory of a step each way, and the faster of our layouts relative to the others."""
    pythons = dict.fromkeys(("ours-packed", "ours-padded", "bare-packed", "bare-padded"), sys.executable)
    if trl_python:
        pythons["trl"] = trl_python
    measured = {way: worker("benchmarks.learner_workers", way, settings, python) for way, python in pythons.items()}
    seconds = {way: values["median_s"] for way, values in measured.items()}
    best = min(("ours-packed", "ours-padded"), key=seconds.__getitem__)
    figures = []
    for way in pythons:
        label = way.replace("-", "_")
        figures.append(Figure(f"{prefix}step_{label}_s", seconds[way], "s"))
        figures.append(Figure(f"{prefix}step_{label}_peak_mib", measured[way]["peak_mib"], "MiB", "whole process"))
        if not way.startswith("ours"):
            reference = f"{way} ÷ {best}, same tokens, {settings['dtype']}"
            figures.append(Figure(f"{prefix}step_vs_{label}", seconds[way] / seconds[best], "ratio", reference))
    return figures


def measure(quick: bool) -> list[Figure]:
    """All figures; one repetition, and the main case and the small model alone, with ``quick``."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", MALLOC_BYTES)
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", MALLOC_BYTES)
    trl_python = os.environ.get("SINGLESTREAM_TRL_PYTHON")
    figures = []
    for prefix, settings in CASES.items():
        if quick:
            settings = {**settings, "repetitions": 1}
        if not quick or "even" not in prefix:
            figures += compare(prefix, settings, trl_python)
    return figures


if __name__ == "__main__":
    run("learner", measure)
