"""The sampler: golden weights, the law of a draw without replacement, and its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from services.value_store import sampler


def make_weights(alpha: list[float], beta: list[float], mode: str = "uncertainty", gamma: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(1)
    return sampler.weights(np.array(alpha), np.array(beta), 1.0, mode, 0.05, gamma, rng)  # type: ignore[arg-type]


def test_uncertainty_weight_is_the_papers() -> None:
    got = make_weights([4.0, 1.0, 8.0], [4.0, 3.0, 0.0 + 1e-12])
    assert got == pytest.approx([0.5 + 0.05, np.sqrt(0.25 * 0.75) + 0.05, 0.05], abs=1e-6)


def test_gamma_divides_the_root_by_n_eff() -> None:
    assert make_weights([4.0], [4.0], gamma=0.5) == pytest.approx([0.5 / np.sqrt(8.0) + 0.05])
    rng = np.random.default_rng(1)
    faded = sampler.weights(np.array([4.0]), np.array([4.0]), np.array([0.5]), "uncertainty", 0.05, 1.0, rng)
    assert faded == pytest.approx([0.5 / 4.0 + 0.05])


def test_uniform_weight() -> None:
    assert make_weights([9.0, 0.1], [0.1, 0.1], "uniform").tolist() == [1.0, 1.0]


def test_thompson_draws_from_the_posterior() -> None:
    n = 20_000
    got = make_weights([2.0] * n, [5.0] * n, "thompson") - 0.05
    draws = np.random.default_rng(2).beta(2.0, 5.0, n)
    assert stats.ks_2samp(got, np.sqrt(draws * (1 - draws))).pvalue > 1e-4
    assert got.std() > 0.05


def test_frequencies_match_the_weights() -> None:
    """First draws follow the weights (χ²), and pairs follow them among what is left."""
    rng = np.random.default_rng(3)
    weight = np.array([0.05, 0.55, 0.3, 0.0, 0.1, 0.45])
    draws = [tuple(sampler.draw(weight, 2, rng)) for _ in range(30_000)]
    share = weight / weight.sum()
    first = np.bincount([a for a, _ in draws], minlength=6)
    keep = weight > 0
    assert first[3] == 0
    assert stats.chisquare(first[keep], share[keep] * len(draws)).pvalue > 1e-4
    second = np.bincount([b for a, b in draws if a == 1], minlength=6)
    left = np.where(np.arange(6) == 1, 0.0, weight)
    left_share = left[left > 0] / left.sum()
    assert stats.chisquare(second[left > 0], left_share * second.sum()).pvalue > 1e-4


def test_a_heavy_row_does_not_hold_up_the_rest() -> None:
    weight = np.full(1000, 1e-9)
    weight[7] = 1.0
    got = sampler.draw(weight, 1000, np.random.default_rng(4))
    assert sorted(got.tolist()) == list(range(1000))


@given(st.lists(st.sampled_from([0.0, 0.05, 0.55, 3.0]), max_size=60), st.integers(0, 80), st.integers(0, 1000))
def test_draws_are_distinct_eligible_and_as_many_as_there_are(weight: list[float], count: int, seed: int) -> None:
    got = sampler.draw(np.array(weight, np.float64), count, np.random.default_rng(seed)).tolist()
    assert len(got) == len(set(got)) == min(count, sum(w > 0 for w in weight))
    assert all(weight[row] > 0 for row in got)


def test_entropy() -> None:
    assert sampler.entropy(np.full(8, 0.3)) == pytest.approx(np.log(8))
    assert sampler.entropy(np.array([1.0, 0.0])) == 0.0
    assert sampler.entropy(np.zeros(3)) == 0.0
