"""Log-probs of chosen tokens with one chunk of logits in memory at a time, in the forward and in the backward pass.

Axes: A tokens to score, C tokens of a chunk, E of those whose entropy is measured, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

ENTROPY_TOKENS = 256
"""Tokens of a micro-batch on which the entropy is measured: it takes one more pass over their logits."""


def _logits(hidden_CH: torch.Tensor, head_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    """A fresh [C, V] tensor in fp32: h·Wᵀ/temperature."""
    logits_CV = (hidden_CH @ head_VH.t()).float()
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


class ChunkedLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """The log softmax(h·Wᵀ/temperature) at the targets, and the mean entropy of a sample of them, without gradient.

    With P the softmax, d log p(y) / d logits = onehot(y) − P: one buffer of logits serves for all of it. Several
    chunks compute theirs again in the backward pass; a single one keeps its own, which the backward pass overwrites.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_AH: torch.Tensor,
        head_VH: torch.Tensor,
        targets_A: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores in fp32, [A], and the entropy, a scalar."""
        tokens = len(targets_A)
        stride = -(-tokens // ENTROPY_TOKENS)
        chosen, normalisers = [], []
        entropy = torch.zeros((), dtype=torch.float32, device=hidden_AH.device)
        kept: tuple[torch.Tensor, ...] = ()
        for start in range(0, tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            at_C1 = targets_A[rows, None]
            logits_CV = _logits(hidden_AH[rows], head_VH, temperature)
            logprobs_CV = logits_CV.log_softmax(-1)
            chosen.append(logprobs_CV.gather(1, at_C1)[:, 0])
            normalisers.append(logits_CV.gather(1, at_C1)[:, 0] - chosen[-1])
            del logits_CV
            sample_EV = logprobs_CV[-start % stride :: stride]  # every stride-th token of all, whatever the chunks
            entropy -= (sample_EV.exp() * sample_EV).sum()
            if tokens <= chunk_tokens:
                kept = (logprobs_CV,)
            del logprobs_CV, sample_EV  # before there is the next chunk
        ctx.save_for_backward(hidden_AH, head_VH, targets_A, torch.cat(normalisers), *kept)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        entropy /= -(-tokens // stride)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(chosen), entropy

    @staticmethod
    def backward(
        ctx: Any, grad_A: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        """Gradients of h and W; W's is summed over chunks in fp32, and None where W is frozen."""
        hidden_AH, head_VH, targets_A, normaliser_A, *kept = ctx.saved_tensors
        scale_A1 = -grad_A[:, None] / ctx.temperature  # upon rows of H, not of V
        grad_hidden_AH = torch.empty_like(hidden_AH)
        grad_head_VH: Any = None
        for start in range(0, len(targets_A), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            if kept:
                slope_CV = kept[0].exp_()
            else:
                slope_CV = _logits(hidden_AH[rows], head_VH, ctx.temperature).sub_(normaliser_A[rows, None]).exp_()
            slope_CV.scatter_add_(1, targets_A[rows, None], -torch.ones_like(scale_A1[rows]))
            slope_CV = slope_CV.to(head_VH.dtype)
            grad_hidden_AH[rows] = (slope_CV @ head_VH) * scale_A1[rows]
            if ctx.needs_input_grad[1]:
                part_VH = slope_CV.t() @ (hidden_AH[rows] * scale_A1[rows]).to(head_VH.dtype)
                grad_head_VH = part_VH.float() if grad_head_VH is None else grad_head_VH.add_(part_VH)
                del part_VH
            del slope_CV
        return grad_hidden_AH, None if grad_head_VH is None else grad_head_VH.to(head_VH.dtype), None, None, None


def score(
    hidden_AH: torch.Tensor, head_VH: torch.Tensor, targets_A: torch.Tensor, temperature: float, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the targets in fp32, [A], and the mean entropy in nats of a sample of them, without gradient.

    Args:
        hidden_AH: the hidden state before each target.
        head_VH: the output embedding.
        targets_A: at least one token id.
        temperature: of the scored sampling.
        chunk_tokens: rows of logits in memory at a time.

    The sample is every k-th target, at most `ENTROPY_TOKENS` of them.
    """
    result: tuple[torch.Tensor, torch.Tensor] = ChunkedLogprobs.apply(
        hidden_AH, head_VH, targets_A, temperature, chunk_tokens
    )
    return result
