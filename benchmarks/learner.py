"""The learner's optimizer step beside a bare transformers + AdamW loop and TRL's GRPO trainer; its peak memory.

``python -m benchmarks.learner [--quick] [--json FILE]``, about 8 minutes on two cores. Same model, tokens, dtype and
machine; ratios above 1 mean that ours is faster. TRL is measured where ``SINGLESTREAM_TRL_PYTHON`` names an interpreter
that has it (an environment of its own: ``pip install trl``). Threads: ``OMP_NUM_THREADS`` (2), waiting passively, since
a busy machine punishes spinning threads more than it tells about a step. Memory is `benchmarks.learner_memory`'s, which
alone measures longer trajectories and draws the plot.

Responses of the main case are log-normal with p99 / median = 5 (log-sigma 0.69): response lengths have a long tail
(arXiv 2509.21009, 2605.30859). The width is our choice: the collection times quoted in docs/spo.md (112 against 486 s)
take a log-sigma of about 1.1, at which padding costs more. The other cases have lengths within a narrow range, where it
costs little: what stands there is the step alone.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks import learner_memory
from benchmarks.harness import Figure, run
from benchmarks.learner_process import worker

KEEP_FREED = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(16 << 30))
"""Keeps freed memory in the process: page faults cost half of a CPU step of the 135 M model. For every way alike."""
WAYS = ("ours", "bare-packed", "bare-padded")

SMOLLM2 = {
    "model": "smollm2", "dtype": "bfloat16", "batch": 32, "micro_batch_tokens": 1024, "bare_packed_tokens": 512,
    "repetitions": 1,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "": {
        **SMOLLM2, "prompt_tokens": 24, "response_tokens": {"median": 64, "log_sigma": 0.69}, "trl_micro_batch": 4,
    },
    "smollm2_even_": {
        **SMOLLM2, "batch": 16, "prompt_tokens": 48, "response_tokens": {"low": 16, "high": 80}, "trl_micro_batch": 8,
    },
    "tiny_": {
        "model": "tiny", "dtype": "float32", "batch": 128, "prompt_tokens": 25, "micro_batch_tokens": 8192,
        "bare_packed_tokens": 512, "response_tokens": {"low": 8, "high": 60}, "trl_micro_batch": 128, "repetitions": 15,
    },
}  # fmt: skip
"""Prefix of the figures → settings; the main case has none. Micro-batches hold about as many tokens for all; rows of
the bare packed way are shorter, as its mask grows with their square. ``tiny_`` is the demo's model and lengths; the
large model takes one step after one to warm up, since TRL's last most of a minute."""


def compare(prefix: str, settings: dict[str, Any], trl_python: str | None) -> list[Figure]:
    """Seconds and peak memory of a step each way, and the others' seconds over ours."""
    pythons = dict.fromkeys(WAYS, sys.executable) | ({"trl": trl_python} if trl_python else {})
    measured = {
        way: worker("benchmarks.learner_workers", way, settings, python, **KEEP_FREED)
        for way, python in pythons.items()
    }
    figures = []
    for way, values in measured.items():
        label = way.replace("-", "_")
        figures.append(Figure(f"{prefix}step_{label}_s", values["median_s"], "s"))
        figures.append(Figure(f"{prefix}step_{label}_peak_mib", values["peak_mib"], "MiB", "whole process"))
        if way != "ours":
            reference = f"{way} ÷ ours, same tokens, {settings['dtype']}"
            ratio = values["median_s"] / measured["ours"]["median_s"]
            figures.append(Figure(f"{prefix}step_vs_{label}", ratio, "ratio", reference))
    return figures


def measure(quick: bool) -> list[Figure]:
    """All figures; with ``quick`` one repetition and no even lengths."""
    trl_python = os.environ.get("SINGLESTREAM_TRL_PYTHON")
    figures = []
    for prefix, settings in CASES.items():
        if quick:
            settings = {**settings, "repetitions": 1}
        if not quick or "even" not in prefix:
            figures += compare(prefix, settings, trl_python)
    return figures + learner_memory.measure(quick=True)


if __name__ == "__main__":
    run("learner", measure)
