"""One step's record: the fields of ``steps.jsonl``, from which the metrics are taken too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.learner.intake import Batch
from services.learner.metrics import PERCENTILES
from services.learner.policy import StepResult

DECIMALS = 6


class Timer:
    """Seconds of a step by what they went into.

    Args:
        wait_s: seconds already spent on waiting for the batch.
        checkpoint_s: seconds of the checkpoint written since the step before.
    """

    def __init__(self, wait_s: float, checkpoint_s: float) -> None:
        self.seconds = {"wait": wait_s, "forward_backward": 0.0, "publish": 0.0, "checkpoint": checkpoint_s}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - started


@dataclass(frozen=True)
class Step:
    """What a step left behind for its record.

    Args:
        batch: what was trained.
        raw_N: advantages before normalisation.
        result: of the optimizer step.
        drift: mean |log π_{k+1} − log π_k| on the probe, nats.
        drift_source: which tokens the probe had.
        drift_tokens: how many.
        seconds: by part of the step.
    """

    batch: Batch
    raw_N: NDArray[np.float64]
    result: StepResult
    drift: float
    drift_source: str
    drift_tokens: int
    seconds: dict[str, float]

    def record(self, step: int, lineage: int, z: float, weights_crc32: int) -> dict[str, Any]:
        """The record; docs/learner.md has the unit and meaning of each field."""
        samples = self.batch.samples
        busy_s = sum(seconds for part, seconds in self.seconds.items() if part != "wait")
        actions = sum(sample.action_tokens for sample in samples)
        percentiles = np.percentile(self.raw_N, PERCENTILES)
        fields: dict[str, Any] = {
            "step": step,
            "policy_version": step,
            "lineage": lineage,
            "trajectories": len(samples),
            "stale": self.batch.stale,
            "reward_mean": _mean([sample.reward for sample in samples]),
            "v_hat_mean": _mean([sample.v_hat for sample in samples]),
            "tool_calls_mean": _mean([sample.tool_calls for sample in samples]),
            "version_spans_mean": _mean([sample.policy_versions for sample in samples]),
            "response_tokens_mean": _mean([sample.tokens - sample.prompt_tokens for sample in samples]),
            "action_tokens": actions,
            "masked_tokens": actions - sum(sample.trained_tokens for sample in samples),
            "loss": self.result.loss,
            "grad_norm": self.result.grad_norm,
            "lr": self.result.lr,
            "skipped": int(not self.result.applied),
            **self.result.means,
            **{f"advantage_p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
            "drift": self.drift,
            "drift_source": self.drift_source,
            "drift_tokens": self.drift_tokens,
            "z": z,
            **{f"{part}_s": seconds for part, seconds in self.seconds.items()},
            "learner_idle_ratio": self.seconds["wait"] / max(1e-9, self.seconds["wait"] + busy_s),
            "tokens_per_s": sum(sample.tokens for sample in samples) / max(1e-9, busy_s),
            "weights_crc32": weights_crc32,
        }
        return {name: _plain(value) for name, value in fields.items()}


def _mean(values: list[float] | list[int]) -> float:
    return float(np.mean(values)) if values else 0.0


def _plain(value: Any) -> Any:
    """Short numbers, and None for what JSON cannot carry."""
    if isinstance(value, float):
        return float(f"{value:.{DECIMALS}g}") if np.isfinite(value) else None
    return value
