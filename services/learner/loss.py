"""The policy loss of one global batch, as a pure function of tensors.

Axes: A action tokens, of all trajectories of a micro-batch, end to end. With ℓ the learner's log-prob, b the engine's,
p the old policy's, m the mask, A the normalised advantage and N the action tokens of the whole batch before masks::

    w = stop_gradient(min(e^(p−b), truncation)) · 1[1/ratio_mask ≤ e^(p−b) ≤ ratio_mask]
    r = e^(ℓ−p)
    g = min(r·A, clip(r, 1−clip_low, 1+clip_high)·A);  where A < 0:  g = max(g, dual_clip·A)
    L = −(1/N) Σ m·w·g

PPO clips r and truncation acts on p/b, never both on one ratio. With one update a batch p = stop_gradient(ℓ): r is 1
and the clips do nothing. Clip-higher and dual clip: SPO's reference recipe; truncated importance weights ≤ 2: SPO++
(arXiv 2608.24870).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class LossSettings:
    """Numbers of the loss; `LearnerConfig` documents each."""

    old: Literal["sg", "behaviour"] = "sg"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    truncation: float | None = 2.0
    ratio_mask: float = 8.0


@dataclass(frozen=True)
class Objective:
    """What `objective` computed; only ``loss`` carries a gradient.

    Args:
        loss: scalar, this micro-batch's share of L: the shares of all micro-batches and ranks add up to L.
        terms_A: w·g.
        weights_A: w.
        ratio_A: r.
        log_shift_A: p − b, before truncation and masks.
        low_A: True where the lower clip holds the gradient back; ``high_A`` the upper one, ``dual_A`` the dual clip.
    """

    loss: torch.Tensor
    terms_A: torch.Tensor
    weights_A: torch.Tensor
    ratio_A: torch.Tensor
    log_shift_A: torch.Tensor
    low_A: torch.Tensor
    high_A: torch.Tensor
    dual_A: torch.Tensor


def importance_weights(log_shift_A: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """The w of p − b: capped at ``truncation``, 0 outside [1/ratio_mask, ratio_mask]; 1 where truncation is None."""
    if settings.truncation is None:
        return torch.ones_like(log_shift_A)
    ratio_A = log_shift_A.exp()
    inside_A = (ratio_A >= 1.0 / settings.ratio_mask) & (ratio_A <= settings.ratio_mask)
    return torch.where(inside_A, ratio_A.clamp(max=settings.truncation), torch.zeros_like(ratio_A))


def objective(
    logprobs_A: torch.Tensor,
    behaviour_A: torch.Tensor,
    advantages_A: torch.Tensor,
    mask_A: torch.Tensor,
    batch_action_tokens: int,
    settings: LossSettings,
    old_A: torch.Tensor | None = None,
) -> Objective:
    """The loss to the letter of the module's formula.

    Args:
        logprobs_A: ℓ, with gradient.
        behaviour_A: b.
        advantages_A: normalised advantage of each token's trajectory.
        mask_A: bool; False tokens add nothing, to the loss and to its gradient, whatever their log-probs are (not even
            NaN).
        batch_action_tokens: N of the global batch.
        settings: numbers of the loss.
        old_A: p, where it was computed at the start of the batch (several updates a batch); None takes
            stop_gradient(ℓ), or b with ``old = "behaviour"``.

    A non-finite log-prob of an unmasked token makes the loss non-finite; the caller refuses such a step.
    """
    # before any exp: behind one, a masked token's gradient would be 0 · e^NaN
    logprobs_A = torch.where(mask_A, logprobs_A, torch.zeros_like(logprobs_A))
    current_A = logprobs_A.detach()
    if settings.old == "behaviour":
        old_A = behaviour_A
    elif old_A is None:
        old_A = current_A
    log_shift_A = old_A - behaviour_A
    weights_A = importance_weights(log_shift_A, settings)
    ratio_A = (logprobs_A - old_A).exp()
    plain_A = ratio_A * advantages_A
    clipped_A = ratio_A.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high) * advantages_A
    gain_A = torch.minimum(plain_A, clipped_A)
    floor_A = settings.dual_clip * advantages_A
    negative_A = advantages_A < 0
    gain_A = torch.where(negative_A, torch.maximum(gain_A, floor_A), gain_A)
    terms_A = weights_A * gain_A
    loss = -torch.where(mask_A, terms_A, torch.zeros_like(terms_A)).sum() / max(1, batch_action_tokens)
    fixed_A = ratio_A.detach()
    return Objective(
        loss=loss,
        terms_A=terms_A.detach(),
        weights_A=weights_A,
        ratio_A=fixed_A,
        log_shift_A=log_shift_A.detach(),
        low_A=negative_A & (fixed_A < 1.0 - settings.clip_low),
        high_A=(advantages_A > 0) & (fixed_A > 1.0 + settings.clip_high),
        dual_A=negative_A & (fixed_A > settings.dual_clip),
    )
