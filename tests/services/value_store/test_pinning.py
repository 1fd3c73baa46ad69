"""Which replicas a pinned evaluation holds: pure, from their reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.value_store import issuing, pinning
from services.value_store.jobs import Job
from services.value_store.pinning import Replica, next_pin
from singlestream.contracts import Sampling
from singlestream.streams.pins import Pin

JOB = "0123456789ab"


def job(pinned: bool = True, number: str = JOB, created_at_s: float = 1.0) -> Job:
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20)
    return Job(number, "evaluate", ["a" * 16, "b" * 16], 2, sampling, created_at_s, pinned=pinned)


def replica(name: str, version: int = 7, pinned: str | None = None, lineage: int = 1) -> Replica:
    return Replica(name, 4, 0, version, lineage, 100.0, pinned)


def held_to(version: int) -> Job:
    one = job()
    one.version, one.lineage = version, 1
    return one


def test_one_is_asked_and_what_it_holds_is_the_version() -> None:
    alive = [replica("a", 6), replica("b", 7), replica("c", 7)]
    asked = next_pin(None, job(), alive, 3)
    assert asked == Pin(JOB, ("c",))  # the newest weights
    # b has gone on meanwhile; c says what it holds
    answered = [replica("a", 6), replica("b", 8), replica("c", 7, JOB)]
    assert next_pin(asked, job(), answered, 3) == Pin(JOB, ("c",), 7, 1)


def test_those_that_hold_the_same_join_up_to_the_number_allowed() -> None:
    alive = [replica("a"), replica("b", 8), replica("c", pinned=JOB), replica("d")]
    pin = Pin(JOB, ("c",), 7, 1)
    assert next_pin(pin, held_to(7), alive, 9) == Pin(JOB, ("c", "a", "d"), 7, 1)
    assert next_pin(pin, held_to(7), alive, 2) == Pin(JOB, ("c", "a"), 7, 1)
    assert next_pin(pin, held_to(7), alive, 0) == Pin(JOB, (), 7, 1)


def test_the_asked_one_dies_before_it_answers() -> None:
    assert next_pin(Pin(JOB, ("c",)), job(), [replica("a"), replica("b")], 2) == Pin(JOB, ("b",))
    assert next_pin(Pin(JOB, ("a",)), job(), [replica("a", 6), replica("b", 9)], 2) == Pin(JOB, ("a",))


def test_no_pin_without_a_pinned_job() -> None:
    for one in (None, job(pinned=False)):
        assert next_pin(Pin(JOB, ("a",), 7, 1), one, [replica("a")], 1) is None
    other = job(number="f" * 12)
    assert next_pin(Pin(JOB, ("a",), 7, 1), other, [replica("a")], 1) == Pin("f" * 12, ("a",))


def test_a_version_that_everyone_has_passed_is_lost() -> None:
    assert pinning.lost((7, 1), [replica("a", 8), replica("b", 9)]) is not None
    assert "7.1 is on no replica any more, they hold 8.1, 9.1" in str(
        pinning.lost((7, 1), [replica("a", 8), replica("b", 9)])
    )
    assert pinning.lost((7, 1), [replica("a", 8), replica("b", 7)]) is None
    assert pinning.lost((7, 1), [replica("a", 8), replica("b", 0, lineage=0)]) is None  # it has loaded nothing yet
    assert pinning.lost((7, 1), []) is None  # nobody is there: all wait
    assert pinning.lost(None, [replica("a", 8)]) is None


def test_evaluations_run_one_at_a_time() -> None:
    first, second = job(False, "f" * 12, 1.0), job(True, "a" * 12, 2.0)
    assert pinning.current_evaluation([second, first]) is first
    first.finished_at_s = 3.0
    assert pinning.current_evaluation([second, first]) is second


@pytest.mark.parametrize(
    ("alive", "share", "training", "most"),
    [
        (1, 1.0, True, 1),
        (4, 0.25, True, 1),
        (10, 0.3, True, 3),
        (3, 0.5, True, 1),
        (1, 0.5, True, 1),  # there is no smaller part of it
        (3, 0.25, True, 1),
        (3, 0.25, False, 3),
        (0, 0.5, True, 0),
    ],
)
def test_capacity(alive: int, share: float, training: bool, most: int) -> None:
    assert pinning.capacity(alive, share, training) == most


def test_what_is_waited_for_is_named() -> None:
    one, alive = job(), [replica("a")]

    def told(job: Job, first: Job | None = None, pin: Pin | None = None, who: object = alive) -> str | None:
        return pinning.waiting_for(job, first or job, pin, who)  # type: ignore[arg-type]

    assert "none has reported" in str(told(one, who=[]))
    assert "one at a time" in str(told(one, job(number="f" * 12)))
    assert told(one) == "a replica to hold its weights"
    assert told(held_to(7), pin=Pin(JOB, (), 7, 1)) == "a replica that holds policy version 7.1"
    assert told(held_to(7), pin=Pin(JOB, ("a",), 7, 1)) is None
    assert told(job(pinned=False)) is None


def test_unread_training_leases_do_not_starve_a_pinned_evaluation() -> None:
    held, unread = {"train": 0, "estimate": 0, "evaluate": 0}, {"train": 50, "estimate": 0, "evaluate": 0}
    alive = [replica("a")]
    assert issuing.shared_and_pinned(alive, None, held, unread) == (0, 0)  # type: ignore[arg-type]
    shared, pinned = issuing.shared_and_pinned(alive, Pin(JOB, ("a",), 7, 1), held, unread)  # type: ignore[arg-type]
    assert (shared, pinned) == (0, 4 + issuing.MIN_BACKLOG)
    both = [replica("a"), replica("b")]
    assert issuing.shared_and_pinned(both, Pin(JOB, ("a",), 7, 1), held, {**unread, "train": 1}) == (  # type: ignore[arg-type]
        4 + issuing.MIN_BACKLOG - 1,
        4 + issuing.MIN_BACKLOG,
    )


def test_evaluation_keeps_to_its_share_of_the_slots_while_training_runs() -> None:
    alive = [replica("a"), replica("b")]
    assert issuing.evaluation_room(0, alive, 0.25, training=True) == 2
    assert issuing.evaluation_room(3, alive, 0.25, training=True) == 0
    assert issuing.evaluation_room(3, alive, 0.25, training=False) == issuing.MAX_EVALUATIONS
    estimate = Job("f" * 12, "estimate", ["a" * 16], 3, job().sampling, 0.5)
    items = issuing.pending_items([job(False), estimate], 10, 1)
    assert [(one.purpose, item) for one, item in items] == [*(("estimate", i) for i in range(3)), ("evaluate", 0)]


names = st.sampled_from("abc")
reports = st.lists(
    st.builds(replica, names, st.integers(0, 3), st.sampled_from([None, JOB]), st.integers(0, 2)),
    max_size=3,
    unique_by=lambda one: one.name,
)


@given(st.lists(st.tuples(reports, st.integers(0, 3)), max_size=8))
def test_a_version_once_known_never_changes(steps: list[tuple[list[Replica], int]]) -> None:
    one, pin = job(), None
    for alive, most in steps:
        before = one.policy
        pin = next_pin(pin, one, alive, most)
        assert pin is not None
        if pin.policy is not None:
            one.version, one.lineage = pin.policy
        assert before is None or one.policy == before
        assert len(pin.replicas) <= max(most, 1 if pin.policy is None else 0)
        if pin.policy is not None:
            assert all(next(r for r in alive if r.name == name).policy == pin.policy for name in pin.replicas)
