"""Admission (I4) holds for any interleaving of issues and ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.value_store.admission import TRAINING_ENDS, Admission


def test_bounds_by_hand() -> None:
    admission = Admission(train_batch_size=4, max_staleness=1, total_steps=3)
    assert admission.headroom == 8
    admission.issue(8)
    assert admission.binding == "run-ahead"
    admission.end("trained", 4)
    assert admission.headroom == 4
    admission.issue(4)
    assert admission.binding == "total"
    admission.end("stale", 2)
    assert admission.headroom == 2
    admission.end("failed")
    admission.end("cancelled")
    assert admission.headroom == 4
    admission.issue(4)
    admission.end("trained", 8)
    assert admission.finished
    assert admission.headroom == 0
    assert admission.outstanding == 0


def test_synchronous_training_admits_one_batch() -> None:
    admission = Admission(train_batch_size=4, max_staleness=0, total_steps=10)
    admission.issue(admission.headroom)
    assert admission.outstanding == 4
    assert admission.headroom == 0


def test_breaking_the_rule_is_an_error() -> None:
    admission = Admission(train_batch_size=1, max_staleness=0, total_steps=1)
    with pytest.raises(ValueError, match="2 leases issued where 1 are admitted"):
        admission.issue(2)
    with pytest.raises(ValueError, match="1 leases ended where 0 are outstanding"):
        admission.end("trained")
    admission.issue(1)
    with pytest.raises(ValueError, match="cannot end as 'scored'"):
        admission.end("scored")


@given(
    st.integers(1, 5), st.integers(0, 3), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)))
)
def test_the_bounds_hold_whatever_happens(
    batch: int, staleness: int, steps: int, events: list[tuple[int, int]]
) -> None:
    admission = Admission(batch, staleness, steps)
    for event, count in events:
        if event == 4:
            admission.issue(min(count, admission.headroom))
        else:
            admission.end(TRAINING_ENDS[event], min(count, admission.outstanding))
        ended = admission.ended
        assert 0 <= admission.outstanding <= (staleness + 1) * batch
        assert admission.leased - ended["stale"] - ended["failed"] - ended["cancelled"] <= steps * batch
        assert admission.leased == admission.outstanding + sum(ended.values())


@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 5), st.lists(st.sampled_from(TRAINING_ENDS), max_size=200))
def test_a_run_whose_leases_all_end_always_gets_there(batch: int, staleness: int, steps: int, ends: list[str]) -> None:
    """No end loses a slot: whatever fails first, every step is trained in the end."""
    admission = Admission(batch, staleness, steps)
    endings = iter(ends)
    for _ in range(10_000):
        if admission.finished:
            break
        admission.issue(admission.headroom)
        admission.end(next(endings, "trained"))  # type: ignore[arg-type]
    assert admission.finished
    assert admission.ended["trained"] == batch * steps
