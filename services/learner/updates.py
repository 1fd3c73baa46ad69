"""The optimizer updates of one batch.

One update takes the whole batch. Several take one share each: every k-th trajectory, so that each has short and long,
early and late ones alike. Then the old policy p of the loss is scored before the first of them, on the very
micro-batches that are trained, so that r is exactly 1 until the first update has changed something.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.learner.policy import Policy, StepResult
from services.learner.samples import Sample

SUMMED = ("trained_tokens", "weight_sum_check")
"""Of `StepResult.means`: sums over a batch; those ending in ``_max`` are maxima, and all others means over tokens."""


def update(
    policy: Policy, samples: Sequence[Sample], advantages_N: NDArray[np.float64], step: int, updates: int
) -> StepResult:
    """Train one batch with so many optimizer updates. Collective.

    Args:
        policy: the policy under training.
        samples: the batch; with fewer trajectories than updates, each has an update of its own.
        advantages_N: as the loss takes them, scaled over the whole batch.
        step: batches trained so far.
        updates: ≥ 1.

    Returns:
        Of all updates together: see `together`.
    """
    if updates == 1:
        return policy.update(samples, advantages_N, step)
    shares = [slice(first, None, updates) for first in range(min(updates, len(samples)))]
    parts = [samples[share] for share in shares]
    micro_batches = [policy.micro_batches(part) for part in parts]
    if policy.settings.old == "sg":
        old = [policy.logprobs(micros) for micros in micro_batches]
    else:
        old = [[micro.behaviour_A for micro in micros] for micros in micro_batches]
    return together(
        [
            policy.update(part, advantages_N[share], step, list(zip(micros, scores, strict=True)))
            for part, share, micros, scores in zip(parts, shares, micro_batches, old, strict=True)
        ]
    )


def together(results: Sequence[StepResult]) -> StepResult:
    """The updates of one batch as one result.

    Loss and gradient norm are means over the updates; ``applied`` is whether all were, and ``bad_leases`` those of any.
    A refused update changes nothing, and the others stand.
    """
    tokens = np.array([result.means["trained_tokens"] for result in results])
    weights = tokens / tokens.sum() if tokens.sum() else np.full(len(results), 1 / len(results))
    means = {}
    for name in results[0].means:
        values = np.array([result.means[name] for result in results])
        if name in SUMMED:
            means[name] = float(values.sum())
        else:
            means[name] = float(values.max() if name.endswith("_max") else weights @ values)
    return StepResult(
        loss=float(np.mean([result.loss for result in results])),
        grad_norm=float(np.mean([result.grad_norm for result in results])),
        lr=results[-1].lr,
        applied=all(result.applied for result in results),
        bad_leases=[lease for result in results for lease in result.bad_leases],
        means=means,
    )
