"""The drift clock: written once for a version, and what stands in for a version without z."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.value_store.drift_clock import DriftClock, UnknownVersions


def test_the_first_z_of_a_version_stays() -> None:
    clock = DriftClock()
    clock.publish(1, 0.4)
    clock.publish(1, 0.7)
    assert clock.z_of(1) == 0.4
    assert clock.now == 0.4


def test_now_follows_the_learner_back_to_an_older_version() -> None:
    clock = DriftClock({0: 0.0, 1: 0.2})
    assert clock.now == 0.2
    clock.publish(2, 0.5)
    clock.publish(1, 0.2)
    assert clock.now == 0.2
    assert clock.z_of(2) == 0.5


def test_before_anything_is_published_it_stands_at_zero() -> None:
    assert DriftClock().now == 0.0
    assert DriftClock().z_of(7) == 0.0


def test_versions_must_be_looked_up_before_an_older_one_stands_in() -> None:
    clock = DriftClock({1: 0.1, 5: 0.9})
    with pytest.raises(UnknownVersions) as caught:
        clock.require([1, 3, 9])
    assert caught.value.versions == {3, 9}
    clock.miss(3)
    clock.observe(9, 1.5)
    clock.require([1, 3, 9])
    assert clock.lookup(np.array([9, 3, 1, 3])).tolist() == [1.5, 0.1, 0.1, 0.1]


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 10)), max_size=40))
def test_what_was_once_read_never_changes(writes: list[tuple[int, float]]) -> None:
    clock, first = DriftClock(), dict[int, float]()
    for version, z in writes:
        clock.observe(version, z)
        first.setdefault(version, z)
        assert dict(clock.items()) == first
