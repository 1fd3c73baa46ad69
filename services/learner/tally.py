"""What one optimizer step did to its action tokens: sums over micro-batches and ranks, and the means that are logged.

Axes: N samples of the batch, A action tokens of a micro-batch.
"""

from __future__ import annotations

import torch

from services.learner.loss import Objective
from services.learner.ranks import Ranks

BATCH = ("loss", "entropy", "micro_batches")
TOKENS = (
    "trained_tokens", "weight", "weight_squared", "weighted_advantage", "log_shift_abs", "clipped_weights",
    "masked_weights", "clip_low", "clip_high", "clip_dual", "approx_kl", "staleness",
)  # fmt: skip
"""Sums over micro-batches, and over trained action tokens: the order in which they travel between ranks."""
MAXIMA = ("log_shift_max", "staleness_max")


class Tally:
    """Sums of one step, kept on the device until `total`, so that no micro-batch waits for the one before.

    Args:
        samples: N.
        cap: of the importance weights; None: they have none.
        device: of the micro-batches.
    """

    def __init__(self, samples: int, cap: float | None, device: torch.device) -> None:
        self._cap = float("inf") if cap is None else cap
        self._batch = torch.zeros(len(BATCH), dtype=torch.float64, device=device)
        self._tokens = torch.zeros(len(TOKENS), dtype=torch.float64, device=device)
        self._maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=device)
        self._bad_N = torch.zeros(samples, dtype=torch.float64, device=device)

    def add(
        self,
        result: Objective,
        entropy: torch.Tensor,
        advantages_A: torch.Tensor,
        mask_A: torch.Tensor,
        staleness_A: torch.Tensor,
        sample_A: torch.Tensor,
    ) -> None:
        """Count one micro-batch.

        Args:
            result: its objective.
            entropy: mean of a sample of its tokens, nats.
            advantages_A: normalised, of each token's sample.
            mask_A: whether each token trains; others count nowhere, whatever their log-probs are.
            staleness_A: optimizer updates since each was sampled.
            sample_A: the sample of each, as an index into the batch.
        """
        weights_A, shift_A, ratio_A = result.weights_A.double(), result.log_shift_A.double(), result.ratio_A.double()
        columns = (
            torch.ones_like(weights_A), weights_A, weights_A**2, weights_A * advantages_A, shift_A.abs(),
            weights_A >= self._cap, weights_A == 0, result.low_A, result.high_A, result.dual_A,
            ratio_A - 1 - ratio_A.log(), staleness_A,
        )  # fmt: skip
        kept = torch.where(mask_A, torch.stack([column.double() for column in columns]), 0.0)
        self._tokens += kept.sum(1)
        largest = [kept[TOKENS.index(name)].max() for name in ("log_shift_abs", "staleness")]
        self._maxima = torch.maximum(self._maxima, torch.stack(largest))
        self._batch += torch.stack([result.loss.detach().double(), entropy.double(), torch.ones_like(entropy).double()])
        self._bad_N.index_add_(0, sample_A, (~torch.isfinite(result.terms_A) & mask_A).double())

    def total(self, ranks: Ranks) -> tuple[float, dict[str, float], list[int]]:
        """Add up all ranks: the loss, the means by the names that ``steps.jsonl`` uses, the samples not finite."""
        sums = ranks.sum(torch.cat([self._batch, self._tokens, self._bad_N]).cpu())
        maxima = ranks.max(self._maxima.cpu())
        named = dict(zip((*BATCH, *TOKENS), sums.tolist(), strict=False))
        bad = sums[len(BATCH) + len(TOKENS) :].nonzero().flatten().tolist()
        return named["loss"], _means(named, dict(zip(MAXIMA, maxima.tolist(), strict=True))), bad


def _means(total: dict[str, float], largest: dict[str, float]) -> dict[str, float]:
    tokens = max(1.0, total["trained_tokens"])
    squares = total["weight_squared"]
    return {
        "trained_tokens": total["trained_tokens"],
        "entropy": total["entropy"] / max(1.0, total["micro_batches"]),
        "weight_sum_check": total["weighted_advantage"],
        "importance_weight_mean": total["weight"] / tokens,
        "importance_weight_clipped_share": total["clipped_weights"] / tokens,
        "importance_weight_masked_share": total["masked_weights"] / tokens,
        "logprob_shift_mean": total["log_shift_abs"] / tokens,
        "logprob_shift_max": largest["log_shift_max"],
        "ess": total["weight"] ** 2 / (tokens * squares) if squares else 0.0,
        "clip_low_share": total["clip_low"] / tokens,
        "clip_high_share": total["clip_high"] / tokens,
        "clip_dual_share": total["clip_dual"] / tokens,
        "approx_kl": total["approx_kl"] / tokens,
        "staleness_mean": total["staleness"] / tokens,
        "staleness_max": largest["staleness_max"],
    }
