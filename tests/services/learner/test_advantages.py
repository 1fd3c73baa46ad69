from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.learner.advantages import advantages, group_advantages, normalise, score
from services.learner.samples import to_sample
from singlestream.config import Config
from tests.services.learner.recorded import trajectory
from tests.services.learner.reference import reference_group, reference_normalise

REWARDS = st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.99), st.integers(0, 40)), min_size=1, max_size=12)


def test_the_baseline_is_the_one_frozen_at_the_lease() -> None:
    assert advantages(np.array([1.0, 0.0]), np.array([0.25, 0.25])).tolist() == [0.75, -0.25]


def test_a_batch_is_scored_against_its_own_leases_and_by_the_tokens_that_train() -> None:
    """r − v̂ = (¾, −½) with 2 and 4 trained tokens of 3 and 4 sampled: the token mean of Ã is 0 over 2 + 4."""
    one = to_sample(trajectory(1, np.random.default_rng(0), version=0), 0, 4)
    batch = []
    for reward, v_hat, trained, sampled in ((1.0, 0.25, 2, 3), (0.0, 0.5, 4, 4)):
        flags = {"mask_T": np.arange(4) < trained, "action_T": np.arange(4) < sampled}
        batch.append(replace(one, reward=reward, v_hat=v_hat, **flags))
    config = Config(run={"name": "r", "model": "m", "total_steps": 1})  # type: ignore[arg-type]
    scored = score(batch, config)
    assert scored.raw_N.tolist() == [0.75, -0.5]
    assert np.array([2, 4]) @ scored.scaled_N == pytest.approx(0, abs=1e-9)
    assert scored.groups == 0


def test_token_normaliser_by_hand() -> None:
    """A = (1, −1) with 1 and 3 tokens: μ = −½, σ² = (1·2.25 + 3·0.25)/3 = 1."""
    normal = normalise(np.array([1.0, -1.0]), np.array([1, 3]), "token")
    assert normal == pytest.approx([1.5, -0.5], abs=1e-7)


def test_trajectory_normaliser_is_the_reference_recipes() -> None:
    """torch.std of (0.5, −0.5, 0.5, −0.5) is 0.57735 (unbiased); its epsilon is 1e-8."""
    normal = normalise(np.array([0.5, -0.5, 0.5, -0.5]), np.array([7, 1, 1, 1]), "trajectory")
    assert normal == pytest.approx([0.8660254, -0.8660254, 0.8660254, -0.8660254], abs=1e-6)


@pytest.mark.parametrize("over", ["token", "trajectory"])
def test_equal_advantages_give_zeros(over: str) -> None:
    assert np.abs(normalise(np.full(7, 0.1), np.arange(1, 8), over)).max() < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("over", ["token", "trajectory"])
def test_one_trajectory_gives_zero(over: str) -> None:
    assert normalise(np.array([0.7]), np.array([5]), over) == pytest.approx([0.0])  # type: ignore[arg-type]


def test_no_tokens_give_zeros() -> None:
    assert normalise(np.array([0.7, -0.2]), np.array([0, 0]), "token").tolist() == [0.0, 0.0]


@given(REWARDS)
@example([(0.3, 0.1, 40), (0.5, 0.3, 39)] * 6)
def test_token_mean_vanishes(rows: list[tuple[float, float, int]]) -> None:
    raw = advantages(np.array([r for r, _, _ in rows]), np.array([v for _, v, _ in rows]))
    tokens = np.array([n for _, _, n in rows])
    normal = normalise(raw, tokens, "token")
    assert abs((tokens * normal).sum()) < 1e-6


@given(REWARDS, st.sampled_from(["token", "trajectory"]))
def test_against_the_reference(rows: list[tuple[float, float, int]], over: str) -> None:
    raw = [r - v for r, v, _ in rows]
    tokens = [n for _, _, n in rows]
    normal = normalise(np.array(raw), np.array(tokens), over)  # type: ignore[arg-type]
    np.testing.assert_allclose(normal, reference_normalise(raw, tokens, over), rtol=1e-6, atol=1e-6)


def test_groups_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean ½, unbiased deviation 0.57735. A group of one and a group of equals teach nothing."""
    rewards = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.3, 0.3])
    groups = np.array(["a", "a", "b", "a", "a", "c", "c"])
    result = group_advantages(rewards, groups, by_std=True)
    assert result.raw_N.tolist() == [0.5, -0.5, 0.0, -0.5, 0.5, 0.0, 0.0]
    assert result.scaled_N == pytest.approx([0.8660254, -0.8660254, 0, -0.8660254, 0.8660254, 0, 0], abs=1e-7)
    assert (result.groups, result.degenerate) == (3, 2)
    assert group_advantages(rewards, groups, by_std=False).scaled_N.tolist() == result.raw_N.tolist()


def test_no_trajectories_have_no_groups() -> None:
    result = group_advantages(np.array([]), np.array([], np.str_), by_std=True)
    assert (result.groups, result.degenerate, len(result.scaled_N)) == (0, 0, 0)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.1, 0.7]), st.integers(0, 4)), min_size=1, max_size=24),
    st.booleans(),
)
def test_groups_against_the_reference(rows: list[tuple[float, int]], by_std: bool) -> None:
    rewards, groups = [reward for reward, _ in rows], [group for _, group in rows]
    result = group_advantages(np.array(rewards), np.array([f"5f3a9c01:{group}" for group in groups]), by_std)
    expected, degenerate = reference_group(rewards, groups, by_std)
    np.testing.assert_allclose(result.scaled_N, expected, rtol=1e-6, atol=1e-9)
    assert (result.groups, result.degenerate) == (len(set(groups)), degenerate)
