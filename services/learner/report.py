"""One step's record: the fields of ``steps.jsonl``, from which the metrics are taken too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.learner.advantages import Advantages
from services.learner.anchors import ExactDrift
from services.learner.drift import Probe
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
        self.seconds = {
            "wait": wait_s,
            "probe": 0.0,
            "forward_backward": 0.0,
            "publish": 0.0,
            "checkpoint": checkpoint_s,
        }

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
        advantages: before and after scaling.
        result: of the optimizer's updates.
        drift: mean |log π_{k+1} − log π_k| on the probe, nats.
        probe: the drift clock's.
        exact: drift on the prompts' previous responses.
        seconds: by part of the step.
    """

    batch: Batch
    advantages: Advantages
    result: StepResult
    drift: float
    probe: Probe
    exact: ExactDrift
    seconds: dict[str, float]

    def evidence(self, step: int) -> list[dict[str, Any]]:
        """One record for each trajectory counted, as ``evidence.jsonl`` has them; docs/learner.md has the fields."""
        trained = [
            {
                "step": step,
                "lease_id": sample.lease_id,
                "prompt_id": sample.prompt_id,
                "outcome": "trained",
                "reward": sample.reward,
                "v_hat": sample.v_hat,
                "first_version": sample.first_version,
                "version": sample.last_version,
                "tokens": sample.trained_tokens,
                "drift": drift,
                "drift_clock": clock,
            }
            for sample, drift, clock in zip(self.batch.samples, self.exact.drift_N, self.exact.clock_N, strict=True)
        ]
        stale = [
            {
                "step": step,
                "lease_id": one.lease_id,
                "prompt_id": one.prompt_id,
                "outcome": "stale",
                "reward": one.reward,
                "v_hat": one.v_hat,
                "first_version": one.first_version,
                "version": one.last_version,
                "tokens": 0,
                "drift": None,
                "drift_clock": None,
            }
            for one in self.batch.stale
        ]
        return stale + trained

    def record(self, step: int, lineage: int, z: float, weights_crc32: int) -> dict[str, Any]:
        """The record; docs/learner.md has the unit and meaning of each field."""
        samples = self.batch.samples
        busy_s = sum(seconds for part, seconds in self.seconds.items() if part != "wait")
        actions = sum(sample.action_tokens for sample in samples)
        percentiles = np.percentile(self.advantages.raw_N, PERCENTILES)
        fields: dict[str, Any] = {
            "step": step,
            "policy_version": step,
            "lineage": lineage,
            "trajectories": len(samples),
            "stale": len(self.batch.stale),
            "groups": self.advantages.groups,
            "degenerate_groups": self.advantages.degenerate,
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
            "drift_source": self.probe.source,
            "drift_tokens": self.probe.tokens,
            **self.exact.means(),
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
