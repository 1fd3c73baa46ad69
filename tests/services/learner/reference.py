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
