"""The policy under training: one optimizer step over a global batch, and scores without gradient.

Axes: N samples of the batch, A action tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor

from services.learner.loss import LossSettings, Objective, objective
from services.learner.micro_batches import MicroBatch, lay_out
from services.learner.model import count_parameters, load_policy
from services.learner.packing import plan
from services.learner.ranks import Ranks
from services.learner.samples import Sample
from singlestream.config import LearnerConfig

SUMS = (
    "loss", "trained_tokens", "weight", "weight_squared", "weighted_advantage", "log_shift_abs", "clipped_weights",
    "masked_weights", "clip_low", "clip_high", "clip_dual", "approx_kl", "staleness", "entropy", "micro_batches",
)  # fmt: skip
"""Sums over the trained action tokens of one step, in the order in which they travel between ranks."""
MAXIMA = ("log_shift_max", "staleness_max")


@dataclass(frozen=True)
class StepResult:
    """One step's statistics, equal on every rank.

    Args:
        loss: L of the global batch.
        grad_norm: before clipping.
        lr: learning rate used.
        applied: False where the loss or the gradient was not finite: nothing was changed.
        bad_leases: leases whose part of the loss is not finite; empty where only the gradient was at fault.
        means: means over trained action tokens, and counts, by the names that ``steps.jsonl`` uses.
    """

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    bad_leases: list[str]
    means: dict[str, float]


class Policy:
    """Model, optimizer and the way a batch goes through them. Every method is collective.

    Args:
        folder: Hugging Face folder of the policy at version 0.
        settings: the learner's.
        temperature: of the training rollouts.
        ranks: the group.
    """

    def __init__(self, folder: Path, settings: LearnerConfig, temperature: float, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self.model = load_policy(folder, settings, temperature, ranks.mesh(), ranks.device)
        config = self.model.lm.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.longest_tokens = int(config.max_position_embeddings)
        self.size = count_parameters(self.model)
        heads = int(config.num_attention_heads)
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self._attention_size = int(config.num_hidden_layers) * heads * head_size
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        names = ("old", "clip_low", "clip_high", "dual_clip", "truncation", "ratio_mask")
        self.loss_settings = LossSettings(**{name: getattr(settings, name) for name in names})

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step that follows ``step`` steps: rises linearly over the warm-up, then stays."""
        if not self.settings.warmup_steps:
            return self.settings.lr
        return self.settings.lr * min(1.0, (step + 1) / self.settings.warmup_steps)

    def _flops(self, tokens: int) -> float:
        """Floating-point operations of one trajectory's forward and backward pass, recomputation not counted.

        2 a parameter and token forward, 2 for the gradient of what comes in, 2 for the parameter's own where it trains.
        """
        of_parameters = (4.0 if self.settings.lora_rank else 6.0) * self.size
        return tokens * (of_parameters + 6.0 * self._attention_size * tokens)

    def model_flops_share(self, batch: Sequence[Sample], seconds: float) -> float | None:
        """MFU of a step over a batch: operations a second over the peak of all ranks; None where no peak is set."""
        peak = 1e12 * self.settings.peak_tflops * self.ranks.world
        return sum(self._flops(sample.tokens) for sample in batch) / (seconds * peak) if peak and seconds else None

    def micro_batches(self, batch: Sequence[Sample]) -> list[MicroBatch]:
        """This rank's share of a batch; as many on every rank."""
        shares = plan(
            [sample.tokens for sample in batch],
            self.ranks.world,
            self.settings.micro_batch_tokens,
            self.settings.attention,
            cost=self._flops,
        )
        mine = shares[self.ranks.rank]
        return [lay_out(batch, chosen, self.settings.attention, self.ranks.device) for chosen in mine]

    def _score(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_A, entropy = self.model(
            micro.token_ids_BT, micro.position_ids_BT, micro.before_A, micro.targets_A, micro.rows
        )
        return logprobs_A, entropy

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """The log π of each micro-batch's action tokens, without gradient."""
        with torch.no_grad():
            scores = [self._score(micro)[0] for micro in micro_batches]
        self.model.reshard()  # FSDP leaves the root's parameters whole after a forward pass, for a backward to come
        return scores

    def update(
        self,
        batch: Sequence[Sample],
        advantages_N: NDArray[np.float64],
        step: int,
        scored: Sequence[tuple[MicroBatch, torch.Tensor]] | None = None,
    ) -> StepResult:
        """One optimizer step on the loss of the global batch, unless something in it is not finite.

        Args:
            batch: the same samples on every rank.
            advantages_N: normalised.
            step: optimizer steps taken so far.
            scored: this rank's micro-batches and the old policy's log-probs of each, where the batch takes several
                updates; None lays them out here, and takes the policy's own log-probs.
        """
        action_tokens = sum(sample.action_tokens for sample in batch)
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        maxima = torch.zeros(len(MAXIMA), dtype=torch.float64)
        bad_N = torch.zeros(len(batch), dtype=torch.float64)
        for micro, old_A in scored or [(micro, None) for micro in self.micro_batches(batch)]:
            logprobs_A, entropy = self._score(micro)
            advantages_A = torch.as_tensor(advantages_N[micro.samples] if micro.samples else np.zeros(1))
            advantages_A = advantages_A.to(logprobs_A)[micro.row_A]
            result = objective(
                logprobs_A, micro.behaviour_A, advantages_A, micro.mask_A, action_tokens, self.loss_settings, old_A
            )
            result.loss.backward()
            self._account(micro, entropy, advantages_A, result, sums, maxima, bad_N)
        self.ranks.sum(sums)
        self.ranks.max(maxima)
        return self._apply(batch, sums, maxima, bad_N, step)

    def _account(
        self,
        micro: MicroBatch,
        entropy: torch.Tensor,
        advantages_A: torch.Tensor,
        result: Objective,
        sums: torch.Tensor,
        maxima: torch.Tensor,
        bad_N: torch.Tensor,
    ) -> None:
        keep_A = micro.mask_A
        weights_A = result.weights_A[keep_A].double()
        shift_A = result.log_shift_A[keep_A].double()
        log_ratio_A = result.ratio_A[keep_A].double().log()
        ages_A = micro.staleness_A[keep_A].double()
        cap = self.loss_settings.truncation or float("inf")
        real = float(bool(micro.samples))
        values = (
            result.loss.detach().double(), keep_A.sum(), weights_A.sum(), (weights_A**2).sum(),
            (weights_A * advantages_A[keep_A]).sum(), shift_A.abs().sum(), (weights_A >= cap).sum(),
            (weights_A == 0).sum(), result.low_A[keep_A].sum(), result.high_A[keep_A].sum(),
            result.dual_A[keep_A].sum(), (log_ratio_A.exp() - 1 - log_ratio_A).sum(), ages_A.sum(),
            entropy.double() * real, torch.tensor(real),
        )  # fmt: skip
        sums += torch.stack([value.double().cpu() for value in values])
        if len(shift_A):
            maxima[0] = max(maxima[0].item(), shift_A.abs().max().item())
            maxima[1] = max(maxima[1].item(), ages_A.max().item())
        bad_A = ~torch.isfinite(result.terms_A) & keep_A
        for row in micro.row_A[bad_A].unique().tolist():
            bad_N[micro.samples[row]] = 1.0

    def _apply(
        self, batch: Sequence[Sample], sums: torch.Tensor, maxima: torch.Tensor, bad_N: torch.Tensor, step: int
    ) -> StepResult:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        rate = self.learning_rate(step)
        # both are sums over all ranks, so every rank decides alike
        applied = bool(torch.isfinite(norm)) and bool(torch.isfinite(sums[0]))
        bad: list[str] = []
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        else:
            self.ranks.max(bad_N)
            bad = [batch[index].lease_id for index in bad_N.nonzero().flatten().tolist()]
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(float(sums[0]), float(norm), rate, applied, bad, _means(sums, maxima))


def _means(sums: torch.Tensor, maxima: torch.Tensor) -> dict[str, float]:
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    largest = dict(zip(MAXIMA, maxima.tolist(), strict=True))
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
