"""How well v̂ at the lease foretold the reward: Brier score and reliability table, as running sums."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 10
"""Equal bins of v̂ over [0, 1]."""


class Calibration:
    """Sums over all evidence of the run.

    Attributes:
        sums: [BINS, 4] count, Σ v̂, Σ r, Σ (r − v̂)².
    """

    def __init__(self, packed: bytes | None = None) -> None:
        self.sums: NDArray[np.float64] = (
            np.frombuffer(packed, "<f8").reshape(BINS, 4).copy() if packed else np.zeros((BINS, 4))
        )

    def with_evidence(self, v_hat: NDArray[np.float64], reward: NDArray[np.float64]) -> Calibration:
        """New sums with evidence added: v̂ frozen at the lease and its reward, [N] each."""
        grown = Calibration(self.pack())
        bins = np.minimum((v_hat * BINS).astype(np.int64), BINS - 1)
        columns = (np.ones_like(v_hat), v_hat, reward, (reward - v_hat) ** 2)
        for column, values in enumerate(columns):
            grown.sums[:, column] += np.bincount(bins, weights=values, minlength=BINS)
        return grown

    def pack(self) -> bytes:
        """The sums as little-endian doubles."""
        return self.sums.astype("<f8").tobytes()

    @property
    def brier(self) -> float | None:
        """Mean of (r − v̂)²; None before the first evidence."""
        count = self.sums[:, 0].sum()
        return float(self.sums[:, 3].sum() / count) if count else None

    @property
    def error(self) -> float | None:
        """Expected calibration error: mean over the evidence of |mean r − mean v̂| of its bin; None before any."""
        count, v_hat, reward, _ = self.sums.T
        return float(np.abs(reward - v_hat).sum() / count.sum()) if count.any() else None

    def table(self) -> list[dict[str, float | int]]:
        """Reliability: for each bin with evidence its count, mean v̂ and mean reward."""
        return [
            {
                "v_hat_low": i / BINS,
                "v_hat_high": (i + 1) / BINS,
                "count": int(count),
                "v_hat_mean": v / count,
                "reward_mean": r / count,
            }
            for i, (count, v, r, _) in enumerate(self.sums.tolist())
            if count
        ]
