"""Log-probs of chosen tokens with one chunk of logits in memory at a time, in the forward and in the backward pass.

Axes: A tokens to score, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


def logits_of(hidden_AH: torch.Tensor, head_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    """A fresh [A, V] tensor in fp32: h·Wᵀ/temperature."""
    logits_AV = (hidden_AH @ head_VH.t()).float()
    return logits_AV if temperature == 1.0 else logits_AV.div_(temperature)


class ChunkedLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """The log softmax(h·Wᵀ/temperature) at the targets; each chunk's logits are computed again in the backward pass.

    With P the softmax, d log p(y) / d logits = onehot(y) − P: one buffer of logits serves for all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_AH: torch.Tensor,
        head_VH: torch.Tensor,
        targets_A: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> torch.Tensor:
        """Scores in fp32, [A]."""
        chosen, normalisers = [], []
        for start in range(0, len(targets_A), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_CV = logits_of(hidden_AH[rows], head_VH, temperature)
            chosen.append(logits_CV.gather(-1, targets_A[rows, None])[:, 0])
            normalisers.append(logits_CV.logsumexp(-1))
        normaliser_A = torch.cat(normalisers)
        ctx.save_for_backward(hidden_AH, head_VH, targets_A, normaliser_A)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return torch.cat(chosen) - normaliser_A

    @staticmethod
    def backward(ctx: Any, grad_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Gradients of h and W; W's is summed over chunks in fp32."""
        hidden_AH, head_VH, targets_A, normaliser_A = ctx.saved_tensors
        grad_hidden_AH = torch.empty_like(hidden_AH)
        grad_head_VH = torch.zeros_like(head_VH, dtype=torch.float32)
        for start in range(0, len(targets_A), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            slope_CV = logits_of(hidden_AH[rows], head_VH, ctx.temperature)
            slope_CV.sub_(normaliser_A[rows, None]).exp_().neg_()
            slope_CV.scatter_add_(1, targets_A[rows, None], torch.ones_like(grad_A[rows, None]))
            slope_CV.mul_(grad_A[rows, None] / ctx.temperature)
            slope_CV = slope_CV.to(head_VH.dtype)
            grad_hidden_AH[rows] = slope_CV @ head_VH
            grad_head_VH += slope_CV.t() @ hidden_AH[rows]
        return grad_hidden_AH, grad_head_VH.to(head_VH.dtype), None, None, None


def score(
    hidden_AH: torch.Tensor, head_VH: torch.Tensor, targets_A: torch.Tensor, temperature: float, chunk_tokens: int
) -> torch.Tensor:
    """Log-probs of the targets in fp32, [A]; what fits one chunk is not computed twice.

    Args:
        hidden_AH: the hidden state before each target.
        head_VH: the output embedding.
        targets_A: at least one token id.
        temperature: of the scored sampling.
        chunk_tokens: rows of logits in memory at a time.
    """
    if len(targets_A) > chunk_tokens:
        result: torch.Tensor = ChunkedLogprobs.apply(hidden_AH, head_VH, targets_A, temperature, chunk_tokens)
        return result
    logits_AV = logits_of(hidden_AH, head_VH, temperature)
    return logits_AV.gather(-1, targets_A[:, None])[:, 0] - logits_AV.logsumexp(-1)
