from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from services.learner.loss import LossSettings, objective
from services.learner.ranks import Ranks
from services.learner.tally import Tally


class TwoAlike:
    """Two ranks that counted the same."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values * 2

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_by_hand() -> None:
    """Ratios p/b of 1, 4 (capped at 2), 9 (masked) and NaN; the fifth token does not train, and counts nowhere."""
    shift = torch.tensor([0.0, math.log(4), math.log(9), math.nan, math.nan], dtype=torch.float64)
    mask = torch.tensor([True, True, True, True, False])
    age = torch.tensor([0, 1, 2, 3, 9])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    settings = LossSettings()
    for kept, bad in ((slice(0, 3), []), (slice(0, 5), [2])):
        result = objective(shift[kept], torch.zeros_like(shift[kept]), advantages[kept], mask[kept], 5, settings)
        tally = Tally(3, settings.truncation, torch.device("cpu"))
        sample = torch.tensor([0, 0, 1, 2, 2])[kept]
        for _ in range(2):  # micro-batches
            tally.add(result, torch.tensor(0.5), advantages[kept], mask[kept], age[kept], sample)
        loss, means, found = tally.total(cast(Ranks, TwoAlike()))
        assert found == bad
        if bad:
            assert not math.isfinite(loss) and means["trained_tokens"] == 16 and means["staleness_max"] == 3
            continue
        assert loss == pytest.approx(4 * -(1 - 2) / 5)
        assert means == pytest.approx(
            {
                "trained_tokens": 12, "entropy": 0.5, "weight_sum_check": 4 * (1 - 2), "importance_weight_mean": 1.0,
                "importance_weight_clipped_share": 1 / 3, "importance_weight_masked_share": 1 / 3,
                "logprob_shift_mean": math.log(36) / 3, "logprob_shift_max": math.log(9), "ess": 9 / (3 * 5),
                "clip_low_share": 0, "clip_high_share": 0, "clip_dual_share": 0, "approx_kl": 0, "staleness_mean": 1,
                "staleness_max": 2,
            }
        )  # fmt: skip
