from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from services.learner import chunked_logprobs
from services.learner.chunked_logprobs import score


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_values_and_gradients_are_log_softmaxes(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_logprobs, "ENTROPY_TOKENS", 5)
    torch.manual_seed(0)
    hidden, head = torch.randn(17, 8), torch.randn(40, 8)
    targets, weights = torch.randint(0, 40, (17,)), torch.randn(17)
    gradients = []
    for way in ("plain", "chunked"):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if way == "plain":
            logprobs = ((h @ w.t()) / temperature).log_softmax(-1)
            scores = logprobs.gather(-1, targets[:, None])[:, 0]
            entropy = -(logprobs.exp() * logprobs).sum(-1)[::4].mean().detach()  # every 4th: five of 17
        else:
            scores, entropy = score(h, w, targets, temperature, chunk)
            assert not entropy.requires_grad
        (scores * weights).sum().backward()
        gradients.append((scores.detach(), entropy, h.grad, w.grad))
    for plain, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [8, 100])
def test_a_frozen_head_costs_no_gradient(chunk: int) -> None:
    """One product is left of the backward pass, h's gradient, and where there are several chunks their logits again."""
    hidden, head = torch.randn(17, 8, requires_grad=True), torch.randn(40, 8)
    scores, _ = score(hidden, head, torch.randint(0, 40, (17,)), 1.0, chunk)
    with FlopCounterMode(display=False) as counter:
        scores.sum().backward()
    assert counter.get_total_flops() == (1 if chunk == 100 else 2) * 2 * 17 * 8 * 40


def test_without_gradient_nothing_is_kept() -> None:
    with torch.no_grad():
        scores, _ = score(torch.randn(9, 4), torch.randn(5, 4), torch.randint(0, 5, (9,)), 1.0, 2)
    assert scores.shape == (9,) and not scores.requires_grad
