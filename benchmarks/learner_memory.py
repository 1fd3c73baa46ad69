"""Peak memory of one optimizer step over the length of one trajectory: ours, ours recomputing, and a bare loop.

``python -m benchmarks.learner_memory [--quick] [--plot FILE.svg]``. Each length and way in a process of its own: what
its peak grows by from a step on 16 tokens. A small model with a large vocabulary, so that logits would dominate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.harness import Figure, run
from benchmarks.learner import worker

THOUSANDS = (1, 2, 4, 8)
WAYS = {"peak": "chunked log-probs", "peak-recomputed": "and activation checkpointing", "peak-bare": "bare loop"}
LOGIT_BYTES = 4 * 32_768
"""One token's logits in fp32 with the model's vocabulary."""


def settings(thousands: int) -> dict[str, object]:
    """One trajectory of so many × 1,024 tokens."""
    length = 1024 * thousands
    return {
        "model": "wide", "batch": 1, "prompt_tokens": 16, "response_tokens": [length - 16] * 2,
        "micro_batch_tokens": 16_384,
    }  # fmt: skip


def measure(quick: bool) -> list[Figure]:
    """Bytes a token; our two ways at 1,024 and 4,096 tokens alone with ``quick``."""
    figures = []
    for way in list(WAYS)[: 2 if quick else 3]:
        for thousands in (1, 4) if quick else THOUSANDS:
            name = f"{way.replace('-', '_')}_bytes_per_token_at_{thousands}k"
            value = worker(way, settings(thousands))["bytes_per_token"]
            figures.append(Figure(name, value, "bytes", f"logits in fp32 alone: {LOGIT_BYTES}"))
    return figures


def plot(figures: list[Figure], path: Path) -> None:
    """Peak memory in MiB over tokens, a line for each way."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    values = {figure.name: figure.value for figure in figures}
    _, axes = pyplot.subplots(figsize=(5, 3.2))
    for way, label in WAYS.items():
        prefix = f"{way.replace('-', '_')}_bytes_per_token_at_"
        points = [(k, values[f"{prefix}{k}k"]) for k in THOUSANDS if f"{prefix}{k}k" in values]
        axes.plot([1024 * k for k, _ in points], [1024 * k * v / 2**20 for k, v in points], marker="o", label=label)
    axes.set(xlabel="tokens of one trajectory", ylabel="growth of peak memory, MiB", yscale="log")
    axes.legend()
    axes.figure.tight_layout()
    pyplot.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plot", type=Path)
    options, rest = parser.parse_known_args()
    taken: list[Figure] = []

    def kept(quick: bool) -> list[Figure]:
        """What was measured, kept for the plot."""
        taken.extend(measure(quick))
        return taken

    run("learner_memory", kept, rest)
    if options.plot:
        plot(taken, options.plot)
        print(options.plot, file=sys.stderr)
