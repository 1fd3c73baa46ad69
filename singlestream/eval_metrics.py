"""avg@k, maj@k and pass@k over a benchmark, with bootstrap intervals over its prompts. Pure functions.

pass@k is the unbiased estimator of Chen et al., arXiv 2107.03374, eq. 1. maj@k is worked out exactly where the k
answers are all of the samples, and by drawing subsets of k otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BOOTSTRAPS = 2000
MAJORITY_DRAWS = 200
"""Subsets drawn for maj@k with fewer than all samples; the standard error of a prompt's share is at most .035."""


@dataclass(frozen=True)
class Sampled:
    """One prompt's samples.

    Args:
        rewards: [n] rewards in [0, 1].
        answers: [n] extracted answers; None where there is none. Equal answers must be equal strings.
    """

    rewards: Sequence[float]
    answers: Sequence[str | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval; everything in [0, 1]."""

    value: float
    low: float
    high: float


def average(prompt: Sampled) -> float:
    """avg@n of one prompt: its mean reward."""
    return math.fsum(prompt.rewards) / len(prompt.rewards)


def pass_at(prompt: Sampled, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from the n, has a reward above 0.

    Raises:
        ValueError: k is not in 1..n.
    """
    n = len(prompt.rewards)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    wrong = n - sum(reward > 0 for reward in prompt.rewards)
    return 1.0 - math.comb(wrong, k) / math.comb(n, k)


def majority(prompt: Sampled, chosen: Sequence[int]) -> float:
    """Mean reward of the samples that give the commonest answer among the chosen ones.

    Ties share: the mean over the tied answers. Samples without an answer do not vote; if none has one, 0.
    """
    votes = Counter(prompt.answers[i] for i in chosen if prompt.answers[i] is not None)
    if not votes:
        return 0.0
    top = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == top]
    means = [math.fsum(prompt.rewards[i] for i in chosen if prompt.answers[i] == winner) / top for winner in winners]
    return math.fsum(means) / len(means)


def majority_at(prompt: Sampled, k: int, seed: int = 0) -> float:
    """maj@k of one prompt: `majority` of all samples if k = n, else its mean over `MAJORITY_DRAWS` subsets of k.

    Raises:
        ValueError: k is not in 1..n.
    """
    n = len(prompt.rewards)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} needs at least {k} samples, there are {n}")
    if k == n:
        return majority(prompt, range(n))
    generator = np.random.default_rng(seed)
    draws = [majority(prompt, generator.choice(n, k, replace=False).tolist()) for _ in range(MAJORITY_DRAWS)]
    return math.fsum(draws) / len(draws)


def over_prompts(prompts: Sequence[Sampled], measure: Callable[[Sampled], float], seed: int = 0) -> Estimate:
    """Mean of a measure over prompts, with its percentile bootstrap interval over prompts.

    Raises:
        ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("no prompts")
    values: NDArray[np.float64] = np.array([measure(prompt) for prompt in prompts])
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (BOOTSTRAPS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))
