"""The policy under training: one optimizer step over a global batch, and scores without gradient.

Axes: N samples of the batch, A action tokens of a micro-batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from services.learner.loss import LossSettings, objective
from services.learner.micro_batches import MicroBatch, lay_out
from services.learner.model import count_parameters, load_policy
from services.learner.packing import plan
from services.learner.ranks import Ranks
from services.learner.samples import Sample
from services.learner.tally import Tally
from singlestream.config import LearnerConfig


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
        self.longest_tokens = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
        self.size = count_parameters(self.model)
        heads = int(getattr(config, "num_attention_heads", None) or 0)
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        self._attention_size = int(config.num_hidden_layers) * heads * head_size
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
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
        self.model.shard_again()  # FSDP leaves parameters whole after a forward pass, for a backward to come
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
        micro_batches = scored or [(micro, None) for micro in self.micro_batches(batch)]
        scaled_N = torch.from_numpy(advantages_N).to(self.ranks.device, torch.float32)
        tally = Tally(len(batch), self.loss_settings.truncation, self.ranks.device)
        for left, (micro, old_A) in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            self.model.keep_whole(left > 0)
            logprobs_A, entropy = self._score(micro)
            sample_A = torch.tensor(micro.samples or [0], device=self.ranks.device)[micro.row_A]
            advantages_A, mask_A = scaled_N[sample_A], micro.mask_A
            result = objective(
                logprobs_A, micro.behaviour_A, advantages_A, mask_A, action_tokens, self.loss_settings, old_A
            )
            result.loss.backward()
            if micro.samples:
                tally.add(result, entropy, advantages_A, mask_A, micro.staleness_A, sample_A)
        loss, means, bad = tally.total(self.ranks)
        norm, rate = self._clip(), self.learning_rate(step)
        # both are sums over all ranks, so every rank decides alike
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        leases = [] if applied else [batch[index].lease_id for index in bad]
        return StepResult(loss, norm, rate, applied, leases, means)

    def _clip(self) -> float:
        """Scale the gradients to a norm of at most ``grad_norm``; returns the norm before. Collective."""
        shards = [one.grad.to_local() for one in self.model.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(shards, foreach=True)
        norm = float(self.ranks.sum(norm.double().square().cpu()).sqrt())
        if norm > self.settings.grad_norm:  # not where it is not a number
            torch._foreach_mul_(shards, self.settings.grad_norm / norm)
        return norm
