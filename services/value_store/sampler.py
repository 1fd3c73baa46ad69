"""Which prompts come next.

Weights, and a draw without replacement. Pure functions of arrays with one axis P = prompts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.value_store.posterior import FLOOR

Floats = NDArray[np.float64]
SamplingMode = Literal["uncertainty", "uniform", "thompson"]

ROUNDS_BEFORE_RESUM = 3
"""Rejection rounds before the drawn prompts' weights are set to 0 and the cumulative sum is taken anew."""


def weights(
    alpha: Floats,
    beta: Floats,
    fade: Floats | float,
    mode: SamplingMode,
    epsilon: float,
    gamma: float,
    rng: np.random.Generator,
) -> Floats:
    """Sampling weight of each prompt, [P], > 0 (SPO, arXiv 2509.13232; the division by n_eff^γ is its ICLR version).

    Args:
        alpha: [P] pseudo-counts of success.
        beta: [P] pseudo-counts of failure.
        fade: [P] or a scalar: share of the evidence that is still valid (`Retention.fade`).
        mode: ``uncertainty``: (√(v̂(1−v̂)) / n_eff^γ) + ε. ``thompson``: the same with a draw from Beta(α, β) in
            place of v̂. ``uniform``: 1.
        epsilon: ε > 0: exploration, so that no prompt is lost for good.
        gamma: γ in [0, 1].
        rng: used by ``thompson`` alone.
    """
    if mode == "uniform":
        return np.ones(len(alpha))
    n = alpha + beta
    if mode == "thompson":
        draw = np.clip(rng.beta(np.maximum(alpha * fade, FLOOR), np.maximum(beta * fade, FLOOR)), 0.0, 1.0)
        weight = np.sqrt(draw * (1.0 - draw))
    else:
        weight = np.sqrt(alpha * beta)
        weight /= n  # √(v̂(1−v̂)) = √(αβ)/(α+β): one pass fewer over a million rows
    if gamma > 0.0:
        weight /= (n * fade) ** gamma
    weight += epsilon
    return weight


def draw(weight: Floats, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw distinct rows one after another, each with probability ∝ its weight among the rows left.

    Repeated draws with replacement, dropping what has come before, is exactly that law, and costs one cumulative sum.

    Args:
        weight: [P] ≥ 0; rows of weight 0 are never drawn.
        count: how many; fewer come back where fewer rows have weight.
        rng: source of randomness.

    Returns:
        Row numbers in the order drawn.
    """
    count = min(count, int(np.count_nonzero(weight)))
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        if len(drawn):
            weight = weight.copy()
            weight[drawn] = 0.0
        cumulative = np.cumsum(weight)
        for _ in range(ROUNDS_BEFORE_RESUM):
            missing = count - len(drawn)
            if missing <= 0:
                break
            points = rng.random(missing + missing // 8 + 8) * cumulative[-1]
            rows = np.searchsorted(cumulative, points, side="right")
            rows = rows[rows < len(weight)]
            rows = rows[weight[rows] > 0.0]
            rows = np.concatenate([drawn, rows])
            _, first = np.unique(rows, return_index=True)
            drawn = rows[np.sort(first)][:count]
    return drawn


def entropy(weight: Floats) -> float:
    """Entropy of one draw in nats: log P where all weights are equal."""
    total = float(weight.sum())
    if total <= 0.0:
        return 0.0
    share = weight[weight > 0.0] / total
    return float(-(share * np.log(share)).sum())
