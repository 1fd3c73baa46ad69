from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.learner.packing import Layout, computed_tokens, plan

LAYOUTS: list[Layout] = ["packed", "padded"]


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 4), st.integers(16, 800), st.sampled_from(LAYOUTS))
def test_every_trajectory_stands_once_and_budgets_hold(
    lengths: list[int], ranks: int, budget: int, layout: Layout
) -> None:
    shares = plan(lengths, ranks, budget, layout)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) >= 1
    assert sorted(i for share in shares for micro in share for i in micro) == list(range(len(lengths)))
    for micro in (micro for share in shares for micro in share):
        chosen = [lengths[i] for i in micro]
        assert len(micro) <= 1 or computed_tokens(chosen, layout) <= budget


def test_a_long_trajectory_stands_alone() -> None:
    shares = plan([500, 10, 10], 1, 100, "packed")
    assert sorted(map(sorted, shares[0])) == [[0], [1, 2]]


def test_equal_work_is_shared_equally() -> None:
    shares = plan([100] * 8, 2, 200, "padded")
    assert [sum(len(micro) for micro in share) for share in shares] == [4, 4]


def test_one_micro_batch_is_split_over_two_ranks() -> None:
    shares = plan([10, 10, 10, 10], 2, 1000, "packed")
    assert [len(share[0]) for share in shares] == [2, 2]


def test_a_rank_without_work_gets_an_empty_micro_batch() -> None:
    assert sorted(plan([10], 2, 1000, "packed")) == [[[]], [[0]]]


def test_the_expensive_row_is_balanced_by_cost() -> None:
    lengths = [100, 100, 50, 50, 50, 50]
    shares = plan(lengths, 2, 100, "packed", cost=lambda tokens: float(tokens**2))
    assert [sum(lengths[i] ** 2 for micro in share for i in micro) for share in shares] == [15_000, 15_000]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_still_has_a_micro_batch_a_rank(layout: Layout) -> None:
    assert plan([], 3, 100, layout) == [[[]], [[]], [[]]]
