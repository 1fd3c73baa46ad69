"""Advantages of one train batch: A = r − v̂ of the lease, standardised over the batch.

Axes: N trajectories. Everything is float64, so that a batch of equal advantages gives zeros and not amplified rounding.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-8
"""Added to the standard deviation (SPO, arXiv 2509.13232, and its reference recipe)."""

Floats = NDArray[np.float64]


def advantages(rewards_N: Floats, v_hats_N: Floats) -> Floats:
    """A = r − v̂, with the baseline frozen at the lease (SPO, eq. 6; I5)."""
    return np.asarray(rewards_N, np.float64) - np.asarray(v_hats_N, np.float64)


def normalise(raw_N: Floats, tokens_N: NDArray[np.int64], over: Literal["token", "trajectory"]) -> Floats:
    """Standardise: (A − μ)/(σ + 1e-8), one value a trajectory, broadcast to its tokens by the loss.

    Args:
        raw_N: advantages.
        tokens_N: L, the action tokens of each trajectory that the loss uses (masked ones do not count), each ≥ 0.
        over: ``token``: μ = ΣL·A/ΣL and σ² = ΣL(A−μ)²/(ΣL−1), so that ΣL·Ã = 0 (SPO++, arXiv 2608.24870, eq. 6);
            ``trajectory``: mean and unbiased standard deviation over trajectories (SPO's reference recipe).

    Returns:
        [N], all zero where the spread is not defined: fewer than two trajectories (or tokens).
    """
    weights_N = np.asarray(tokens_N, np.float64) if over == "token" else np.ones(len(raw_N))
    total = weights_N.sum()
    if total < 2:
        return np.zeros(len(raw_N))
    mean = (weights_N * raw_N).sum() / total
    centred_N: Floats = raw_N - mean
    deviation = np.sqrt((weights_N * centred_N**2).sum() / (total - 1))
    return np.asarray(centred_N / (deviation + EPSILON))
