"""Advantages of one train batch, one value a trajectory, broadcast to its tokens by the loss.

``spo``: A = r − v̂ of the lease, standardised over the batch. ``grpo``: A = r less the mean of its group, over the
group's standard deviation, and nothing over the batch.

Axes: N trajectories. Everything is float64, so that a batch of equal advantages gives zeros and not amplified rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.learner.samples import Sample
from singlestream.config import Config
from singlestream.contracts import group_of

EPSILON = 1e-8
"""Added to the standard deviation (SPO, arXiv 2509.13232, and its reference recipe)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Advantages:
    """What `score` made of a batch.

    Args:
        raw_N: r less its baseline.
        scaled_N: what the loss takes.
        groups: groups of the batch; 0 for SPO.
        degenerate: those whose rewards are all equal, one trajectory alone among them: they teach nothing.
    """

    raw_N: Floats
    scaled_N: Floats
    groups: int = 0
    degenerate: int = 0


def score(samples: Sequence[Sample], config: Config) -> Advantages:
    """Advantages of a batch the way the settings say."""
    rewards_N = np.array([sample.reward for sample in samples])
    if config.learner.advantage == "grpo":
        size = config.value_store.group_size
        groups_N = np.array([group_of(sample.lease_id, size) for sample in samples])
        return group_advantages(rewards_N, groups_N, config.learner.group_std)
    raw_N = advantages(rewards_N, np.array([sample.v_hat for sample in samples]))
    tokens_N = np.array([sample.trained_tokens for sample in samples])
    return Advantages(raw_N, normalise(raw_N, tokens_N, config.learner.normaliser))


def advantages(rewards_N: Floats, v_hats_N: Floats) -> Floats:
    """A = r − v̂, with the baseline frozen at the lease (SPO, eq. 6; I5)."""
    return np.asarray(rewards_N, np.float64) - np.asarray(v_hats_N, np.float64)


def normalise(raw_N: Floats, tokens_N: NDArray[np.int64], over: Literal["token", "trajectory"]) -> Floats:
    """Standardise: (A − μ)/(σ + 1e-8).

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
    centred_N: Floats = raw_N - (weights_N * raw_N).sum() / total
    centred_N -= (weights_N * centred_N).sum() / total  # the mean's own rounding: a deviation near 0 would raise it
    deviation = np.sqrt((weights_N * centred_N**2).sum() / (total - 1))
    return np.asarray(centred_N / (deviation + EPSILON))


def group_advantages(rewards_N: Floats, groups_N: NDArray[np.str_], by_std: bool) -> Advantages:
    """A = (r − mean)/(std + 1e-8) over the trajectories of its group (GRPO, arXiv 2402.03300; std unbiased as in verl).

    A group counts with the members that are in the batch, so one that lost members has a mean over fewer.

    Args:
        rewards_N: in [0, 1].
        groups_N: name of each trajectory's group; its members may stand anywhere.
        by_std: False leaves A = r − mean (Dr. GRPO, arXiv 2503.20783).

    Returns:
        ``raw_N`` before the division; 0 throughout a group whose rewards are all equal.
    """
    rewards_N = np.asarray(rewards_N, np.float64)
    _, place_N = np.unique(groups_N, return_inverse=True)
    raw_N, scaled_N = np.zeros(len(rewards_N)), np.zeros(len(rewards_N))
    groups = int(place_N.max(initial=-1)) + 1
    degenerate = 0
    for group in range(groups):
        members = place_N == group
        rewards = rewards_N[members]
        if (rewards == rewards[0]).all():
            degenerate += 1
            continue
        raw_N[members] = rewards - rewards.mean()
        scaled_N[members] = raw_N[members] / (rewards.std(ddof=1) + EPSILON) if by_std else raw_N[members]
    return Advantages(raw_N, scaled_N, groups, degenerate)
