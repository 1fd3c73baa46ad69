from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.learner.advantages import normalise
from services.learner.loss import LossSettings, importance_weights, objective
from tests.services.learner.reference import reference_loss, reference_normalise


def tensors(*columns: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=torch.float64) for column in columns]


def test_by_hand_with_one_update_a_batch() -> None:
    """p = ℓ: r is 1, so L = −(1/N) Σ w·A; ratios ½, 4 (capped at 2) and 9 (dropped); N = 5 counts masked tokens."""
    behaviour = [-1.0, -1.0, -4.0, -1.0]
    current = [-1.0 + math.log(0.5), -1.0 + math.log(4), -4.0 + math.log(9), -1.0]
    logprobs, b, a = tensors(current, behaviour, [1.0, -0.5, 3.0, 100.0])
    logprobs.requires_grad_()
    result = objective(logprobs, b, a, torch.tensor([True, True, True, False]), 5, LossSettings())
    assert result.loss.item() == pytest.approx(-(0.5 * 1.0 + 2 * -0.5) / 5)
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5 / 5, 1.0 / 5, 0.0, 0.0])


def test_clips_by_hand_with_an_old_policy() -> None:
    """r = 2, A = 1: clipped at 1.28; r = ½, A = −1: at −0.8; r = 20, A = −1: dual clip −10; r = 2, A = −1: −2."""
    old = [0.0, 0.0, 0.0, 0.0]
    current = [math.log(2), math.log(0.5), math.log(20), math.log(2)]
    logprobs, b, a, p = tensors(current, old, [1.0, -1.0, -1.0, -1.0], old)
    logprobs.requires_grad_()
    result = objective(logprobs, b, a, torch.ones(4, dtype=torch.bool), 4, LossSettings(), old_A=p)
    assert result.loss.item() == pytest.approx(-(1.28 - 0.8 - 10 - 2) / 4)
    assert result.high_A.tolist() == [True, False, False, False]
    assert result.low_A.tolist() == [False, True, False, False]
    assert result.dual_A.tolist() == [False, False, True, False]
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 0.0, 2 / 4])


def test_masked_tokens_add_nothing_not_even_nan() -> None:
    logprobs, b, a = tensors([-1.0, float("nan")], [-1.0, -1.0], [1.0, 1.0])
    logprobs.requires_grad_()
    result = objective(logprobs, b, a, torch.tensor([True, False]), 2, LossSettings())
    assert result.loss.item() == pytest.approx(-0.5)
    result.loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_an_unmasked_nan_shows_in_the_loss() -> None:
    logprobs, b, a = tensors([-1.0, float("nan")], [-1.0, -1.0], [1.0, 1.0])
    result = objective(logprobs, b, a, torch.ones(2, dtype=torch.bool), 2, LossSettings())
    assert not torch.isfinite(result.loss)


def test_a_ratio_that_overflows_weighs_nothing() -> None:
    weights = importance_weights(torch.tensor([1000.0, -1000.0, 0.0]), LossSettings())
    assert weights.tolist() == [0.0, 0.0, 1.0]


def test_behaviour_mode_is_ppo_against_the_engine() -> None:
    settings = LossSettings(old="behaviour", truncation=None)
    logprobs, b, a = tensors([math.log(2), 0.0], [0.0, 0.0], [1.0, 1.0])
    result = objective(logprobs, b, a, torch.ones(2, dtype=torch.bool), 2, settings)
    assert result.loss.item() == pytest.approx(-(1.28 + 1) / 2)
    assert result.weights_A.tolist() == [1.0, 1.0]


@given(
    st.lists(
        st.tuples(st.floats(-12, 0), st.floats(-12, 0), st.floats(-12, 0), st.floats(-3, 3), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from(["sg", "old", "behaviour", "untruncated"]),
    st.integers(0, 20),
)
def test_against_the_reference(
    rows: list[tuple[float, float, float, float, bool]], mode: str, masked_elsewhere: int
) -> None:
    current, behaviour, old, advantage = (np.array([row[i] for row in rows]) for i in range(4))
    mask = np.array([row[4] for row in rows])
    total = len(rows) + masked_elsewhere
    settings = LossSettings(
        old="behaviour" if mode == "behaviour" else "sg",
        truncation=None if mode in ("behaviour", "untruncated") else 2.0,
    )
    given_old = old if mode == "old" else None
    result = objective(
        *tensors(current.tolist(), behaviour.tolist(), advantage.tolist()),
        torch.from_numpy(mask),
        total,
        settings,
        old_A=None if given_old is None else torch.from_numpy(given_old),
    )
    expected = reference_loss(
        current, behaviour, advantage, mask, total, old=given_old, mode=settings.old, truncation=settings.truncation
    )
    assert result.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


LENGTHS = st.lists(
    st.tuples(st.lists(st.booleans(), max_size=6), st.floats(0, 1), st.floats(0.01, 0.99)), min_size=1, max_size=8
)
"""Of each trajectory whether each of its action tokens trains, its reward and its baseline."""


@given(LENGTHS, st.booleans(), st.sampled_from(["token", "trajectory"]), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_batch_from_its_rewards_to_the_loss_of_all_micro_batches(
    drawn: list[tuple[list[bool], float, float]], equal: bool, over: str, micro_batches: int, seed: int
) -> None:
    """Masks, responses without tokens, equal rewards, a single trajectory; the parts add up to the global loss."""
    rng = np.random.default_rng(seed)
    masks = [np.array(mask, bool) for mask, _, _ in drawn]
    raw = [0.25 if equal else reward - v_hat for _, reward, v_hat in drawn]
    trained = [int(mask.sum()) for mask in masks]
    rows = [np.stack([-rng.exponential(1, len(mask)), -rng.exponential(1, len(mask))]) for mask in masks]
    total = sum(map(len, masks))

    scaled = normalise(np.array(raw), np.array(trained), over)  # type: ignore[arg-type]
    loss = 0.0
    for first in range(micro_batches):
        part = range(first, len(rows), micro_batches)
        if sum(len(masks[i]) for i in part):
            logprobs, behaviour = torch.from_numpy(np.concatenate([rows[i] for i in part], axis=1))
            advantages = torch.from_numpy(np.repeat(scaled[list(part)], [len(masks[i]) for i in part]))
            mask = torch.from_numpy(np.concatenate([masks[i] for i in part]))
            loss += objective(logprobs, behaviour, advantages, mask, total, LossSettings()).loss.item()

    flat = np.concatenate(rows, axis=1)
    expected = np.repeat(reference_normalise(raw, trained, over), [len(mask) for mask in masks])
    assert loss == pytest.approx(
        reference_loss(flat[0], flat[1], expected, np.concatenate(masks), max(1, total)), rel=1e-6, abs=1e-6
    )
