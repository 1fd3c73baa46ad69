"""The loss and the normalisers once more, in float64 numpy: written from the formula, not from the code."""

from __future__ import annotations

import math

import numpy as np


def reference_loss(
    current: np.ndarray,
    behaviour: np.ndarray,
    advantage: np.ndarray,
    mask: np.ndarray,
    total: int,
    *,
    old: np.ndarray | None = None,
    mode: str = "sg",
    low: float = 0.2,
    high: float = 0.28,
    dual: float = 10.0,
    truncation: float | None = 2.0,
    outside: float = 8.0,
) -> float:
    """L = −(1/N) Σ m·w·g, as a loop over tokens."""
    gain = 0.0
    for i in range(len(current)):
        if not mask[i]:
            continue
        p = behaviour[i] if mode == "behaviour" else (current[i] if old is None else old[i])
        shift = math.exp(p - behaviour[i])
        w = 1.0 if truncation is None else (min(shift, truncation) if 1 / outside <= shift <= outside else 0.0)
        r = math.exp(current[i] - p)
        a = advantage[i]
        g = min(r * a, min(max(r, 1 - low), 1 + high) * a)
        if a < 0:
            g = max(g, dual * a)
        gain += w * g
    return -gain / total


def reference_normalise(raw: list[float], tokens: list[int], over: str) -> list[float]:
    """Repeat each advantage by its weight, then standardise with the unbiased deviation."""
    weights = tokens if over == "token" else [1] * len(raw)
    spread = np.repeat(np.array(raw, np.float64), weights)
    if len(spread) < 2:
        return [0.0] * len(raw)
    return [float((a - spread.mean()) / (spread.std(ddof=1) + 1e-8)) for a in raw]


def reference_group(rewards: list[float], groups: list[int], by_std: bool) -> tuple[list[float], int]:
    """Each reward less its group's mean, over its unbiased deviation, 0 where all are equal; how many groups are."""
    members = {group: [r for r, g in zip(rewards, groups, strict=True) if g == group] for group in set(groups)}
    flat = {group for group, inside in members.items() if len(set(inside)) == 1}

    def one(reward: float, group: int) -> float:
        inside = members[group]
        if group in flat:
            return 0.0
        mean = math.fsum(inside) / len(inside)
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in inside) / (len(inside) - 1))
        return (reward - mean) / (spread + 1e-8) if by_std else reward - mean

    return [one(reward, group) for reward, group in zip(rewards, groups, strict=True)], len(flat)
