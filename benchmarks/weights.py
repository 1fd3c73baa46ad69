"""From the learner to a replica on another machine, without model or engine: ``python -m benchmarks.weights``.

The learner's own publisher and HTTP server on loopback, a replica's fetcher, and tmpfs on both sides. 500 MB of bf16 in
layers of 16 MB; each version changes 1 % of the values by one unit in the last place, as a small learning rate does.
Every figure stands beside a plain copy of the same bytes, taken in the same run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Figure, run
from benchmarks.rollout import copy_seconds
from services.rollout.metrics import Metrics
from services.rollout.weight_fetch import WeightFetcher
from singlestream.embedded_redis import EmbeddedRedis
from tests.services.rollout.weight_source import Source, replica_run

LAYERS, LAYER_VALUES = 30, 8 * 2**20
CHANGED = 0.01


class Stopwatch:
    """Collects seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block."""
        started = time.monotonic()
        yield
        self.seconds.setdefault(name, []).append(time.monotonic() - started)

    def median(self, name: str) -> float:
        """Of what was collected under a name."""
        return statistics.median(self.seconds[name])


def first_weights(layers: int) -> dict[str, torch.Tensor]:
    """Random weights, as a model has them at its start."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer{n}": torch.randn(LAYER_VALUES, generator=generator).mul_(0.02).to(torch.bfloat16).view(1024, -1)
        for n in range(layers)
    }


def step(weights: dict[str, torch.Tensor], rng: np.random.Generator) -> None:
    """Move some values of every tensor to a neighbouring bf16 value, in place."""
    for tensor in weights.values():
        bits = tensor.view(torch.int16).numpy().reshape(-1)
        which = rng.integers(0, len(bits), int(CHANGED * len(bits)))
        bits[which] += rng.choice(np.array([-1, 1], np.int16), len(which))


def measure(quick: bool) -> list[Figure]:
    """Publish versions, fetch each; one joiner at the end."""
    timed, rng = Stopwatch(), np.random.default_rng(0)
    weights = first_weights(3 if quick else LAYERS)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ss-bench-") as memory:
        folder = Path(memory)
        server = EmbeddedRedis(folder / "redis")
        server.start()
        source = Source(folder, server.url, "bench")
        replica = WeightFetcher(replica_run(source, folder / "replica"), Metrics(), 60.0)
        ratios, copies, size = [], [], 0
        try:
            for version in range(3 if quick else 6):
                with timed("snapshot"):
                    snapshot = source.publisher.snapshot(weights.items(), version)
                with timed("publication"):
                    source.publisher.announce(snapshot, 0.0, 0.0)
                published = source.newest()
                with timed("full" if version == 0 else "delta"):
                    replica.fetch(published)
                size = published.manifest.total_bytes
                copies.append(copy_seconds(source.publisher.folder / snapshot.final.name))
                if version:
                    ratios.append(source.publisher.delta_ratio or 1.0)
                step(weights, rng)
            joiner = WeightFetcher(replica_run(source, folder / "joiner"), Metrics(), 60.0)
            with timed("full"):
                joiner.fetch(published)
        finally:
            source.close()
            server.stop()
    copy_s = statistics.median(copies)
    plain = f"plain copy of the same {size / 1e6:.0f} MB: {copy_s:.3g} s"
    return [
        Figure("publish_stall_s_500mb", timed.median("snapshot"), "s", "what the learner's loop waits for"),
        Figure("publish_stall_vs_memcpy_500mb", timed.median("snapshot") / copy_s, "ratio", plain),
        Figure("publication_s_500mb", timed.median("publication"), "s", "checksums, delta, announcing: beside a step"),
        Figure("delta_bytes_vs_full", statistics.median(ratios), "ratio", f"{CHANGED:.0%} of the values moved"),
        Figure("fetch_full_s_500mb", timed.median("full"), "s", "HTTP on loopback, checksums; " + plain),
        Figure("fetch_delta_s_500mb", timed.median("delta"), "s", "HTTP, copy of the base, checksums"),
    ]


if __name__ == "__main__":
    run("weights", measure)
