"""Peak memory of one optimizer step over the length of one trajectory: ours, ours recomputing, and a bare loop.

``python -m benchmarks.learner_memory [--quick]``: up to 32k tokens, which takes minutes; ``--quick`` three lengths,
as in `benchmarks.learner`. Each way in a process of its own, which takes a step on each length: what counts is the
process' peak within that step over what it held before it, weights and moments among it. The model is small and its
vocabulary large, so that logits would dominate. The plot goes to ``benchmarks/results``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, run
from benchmarks.learner_process import worker

MODEL = {"model": "wide", "dtype": "float32", "micro_batch_tokens": 16_384}
WAYS = {
    "peak": ("chunked log-probs", (1, 2, 4, 8, 16, 32)),
    "peak_recomputed": ("… and activation checkpointing", (1, 2, 4, 8, 16, 32)),
    "peak_bare": ("bare transformers", (1, 2, 4, 8)),
}
"""Prefix of the figures → (name in the plot, thousands of tokens)."""
LOGIT_BYTES = 4 * 32_768
"""One token's logits in fp32 with the model's vocabulary."""
PLOT = Path("benchmarks/results/learner-memory.svg")


def growth(step: Callable[[int], Any], thousands: list[int]) -> dict[str, float]:
    """Bytes a token by which the process' peak within a step exceeds what it held before; Linux alone can tell."""
    from benchmarks.learner_workers import peak_bytes

    libc = ctypes.CDLL("libc.so.6")
    step(16)  # the moments, and what libraries keep
    grown = {}
    for length in thousands:
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
        before = peak_bytes()
        step(1024 * length)
        grown[str(length)] = (peak_bytes() - before) / (1024 * length)
    return grown


def ours(thousands: list[int], recompute: bool) -> dict[str, float]:
    """Our step on one long trajectory."""
    import numpy as np

    from benchmarks.learner_workers import our_policy, our_samples

    ids = np.random.default_rng(0).integers(3, 100, 1024 * max(thousands))
    with tempfile.TemporaryDirectory() as folder:
        policy = our_policy(MODEL, folder, "packed", recompute)

        def step(tokens: int) -> None:
            policy.update(our_samples([(ids[:8], ids[8:tokens])], np.ones(1)), np.ones(1), 0)

        return growth(step, thousands)


def bare(thousands: list[int]) -> dict[str, float]:
    """The plain loop's step on one long trajectory."""
    import torch

    from benchmarks.learner_workers import Masters, build

    model = build(MODEL["model"])
    masters = Masters(model, torch.float32)
    ids = torch.randint(3, 100, (1, 1024 * max(thousands)))

    def step(tokens: int) -> None:
        logits = model(input_ids=ids[:, :tokens], use_cache=False).logits
        (-logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:tokens, None]).mean()).backward()
        masters.step()

    return growth(step, thousands)


def measure(quick: bool) -> list[Figure]:
    """Bytes a token; three lengths alone with ``quick``. Draws the plot where all lengths are measured."""
    measured = {
        way: worker("benchmarks.learner_memory", way, {"thousands": [1, 4, 8] if quick else list(thousands)})
        for way, (_, thousands) in WAYS.items()
    }
    if not quick:
        plot(measured, PLOT)
    reference = f"logits in fp32 alone: {LOGIT_BYTES}"
    return [
        Figure(f"{way}_bytes_per_token_at_{length}k", value, "bytes", reference)
        for way, grown in measured.items()
        for length, value in grown.items()
    ]


def plot(measured: dict[str, dict[str, float]], path: Path) -> None:
    """Growth in MiB over tokens, a line for each way, and the logits of all tokens at once."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "singlestream"  # the same bytes for the same figures
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6, 3.6))
    for way, (label, _) in WAYS.items():
        tokens = [1024 * int(length) for length in measured[way]]
        grown = [count * value / 2**20 for count, value in zip(tokens, measured[way].values(), strict=True)]
        axes.plot(tokens, grown, marker="o", label=label)
    longest = 1024 * max(WAYS["peak"][1])
    axes.plot(
        [1024, longest], [1024 * LOGIT_BYTES / 2**20, longest * LOGIT_BYTES / 2**20], ":", color="grey",
        label="tokens × vocabulary × 4 bytes, once",
    )  # fmt: skip
    axes.set(xlabel="tokens of one trajectory", ylabel="peak over what was held, MiB", xscale="log", yscale="log")
    ticks = [1024 * length for length in WAYS["peak"][1]]
    axes.set_xticks(ticks, [f"{length}k" for length in WAYS["peak"][1]])
    heights = [2**power for power in range(7, 13)]
    axes.set_yticks(heights, [str(height) for height in heights])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.figure.tight_layout()
    pyplot.savefig(path, metadata={"Date": None})


WORKERS: dict[str, Callable[[list[int]], dict[str, float]]] = {
    "peak": lambda thousands: ours(thousands, recompute=False),
    "peak_recomputed": lambda thousands: ours(thousands, recompute=True),
    "peak_bare": bare,
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WORKERS:
        print(json.dumps(WORKERS[sys.argv[1]](json.loads(sys.argv[2])["thousands"])))
    else:
        run("learner_memory", measure)
