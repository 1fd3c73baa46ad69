from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.learner.batches import BatchAssembler, ConsumedLeases, Position, Verdict
from services.learner.samples import check_scorable, to_sample
from singlestream.contracts import EndOfRun, Message, Segment, Tombstone, group_of
from singlestream.errors import InvalidMessage
from tests.services.learner.recorded import lease, trajectory

RNG = np.random.default_rng(0)


def offer(assembler: BatchAssembler, n: int, message: Message | None, step: int = 0, number: str = "") -> Verdict:
    return assembler.offer(f"{n}-0", number or lease(n), message, b"raw", "damaged", step).verdict


def test_it_stops_exactly_at_the_batch_and_the_cursor_is_that_entry() -> None:
    assembler = BatchAssembler(2, 4, Position())
    for n in (1, 2):
        assert not assembler.complete
        assert offer(assembler, n, trajectory(n, RNG)) is Verdict.TRAINABLE
    assert assembler.complete
    with pytest.raises(ValueError, match="commit"):
        offer(assembler, 3, trajectory(3, RNG))
    assert assembler.commit().cursor == "2-0"
    assert not assembler.complete


def test_an_uncommitted_batch_leaves_the_position_alone() -> None:
    assembler = BatchAssembler(2, 4, Position())
    offer(assembler, 1, trajectory(1, RNG))
    assert assembler.position.cursor == "0-0" and lease(1) not in assembler.position.consumed


def test_a_second_entry_of_a_lease_is_skipped() -> None:
    assembler = BatchAssembler(4, 4, Position())
    offer(assembler, 1, trajectory(1, RNG))
    assert offer(assembler, 2, trajectory(1, RNG)) is Verdict.DUPLICATE
    assert len(assembler.batch) == 1


def test_a_lease_of_an_earlier_batch_is_skipped_too() -> None:
    assembler = BatchAssembler(1, 4, Position())
    offer(assembler, 1, trajectory(1, RNG))
    assembler.commit()
    assert offer(assembler, 2, trajectory(1, RNG)) is Verdict.DUPLICATE


def test_a_tombstone_consumes_its_lease() -> None:
    assembler = BatchAssembler(4, 4, Position())
    stone = Tombstone(lease_id=lease(1), prompt_id="p", reason="attempts", detail="", attempts=3)
    assert offer(assembler, 1, stone) is Verdict.FAILED
    assert offer(assembler, 2, trajectory(1, RNG)) is Verdict.DUPLICATE


def test_a_stale_trajectory_is_closed_at_once() -> None:
    assembler = BatchAssembler(4, 2, Position())
    decision = assembler.offer("1-0", lease(1), trajectory(1, RNG, version=3, reward=1.0), b"", "", 6)
    assert decision.verdict is Verdict.STALE
    assert [(one.outcome, one.reward, one.version) for one in decision.updates] == [("stale", 1.0, 3)]
    assert not assembler.batch


def test_one_young_segment_is_enough() -> None:
    old_and_young = trajectory(1, RNG, version=3)
    young = old_and_young.segments[-1].model_copy(update={"version": 5})
    mixed = old_and_young.model_copy(update={"segments": [*old_and_young.segments[:-1], young]})
    assembler = BatchAssembler(4, 2, Position())
    assert offer(assembler, 1, mixed, step=6) is Verdict.TRAINABLE
    sample = to_sample(mixed, 6, 2)
    assert sample.trained_tokens == len(young.token_ids) < sample.action_tokens
    assert sample.staleness_T[sample.mask_T].max() == 1


def test_a_version_from_the_future_is_not_stale() -> None:
    """After a rollback the stream still holds what newer weights sampled."""
    assert to_sample(trajectory(1, RNG, version=9), 3, 2).staleness_T.max() == 0


def test_damage_with_a_known_lease_closes_it_as_failed() -> None:
    assembler = BatchAssembler(4, 4, Position())
    decision = assembler.offer("1-0", lease(1), None, b"x", "not a msgpack envelope", 0)
    assert decision.verdict is Verdict.MALFORMED and decision.dead_letter == "not a msgpack envelope"
    assert [one.outcome for one in decision.updates] == ["failed"]


@pytest.mark.parametrize("number", ["", "nonsense", "estimate:5f3a9c01:1"])
def test_damage_without_a_training_lease_closes_nothing_of_training(number: str) -> None:
    decision = BatchAssembler(4, 4, Position()).offer("1-0", number, None, b"x", "damaged", 0)
    assert decision.verdict is Verdict.MALFORMED and decision.dead_letter == "damaged"
    assert not decision.updates


def test_the_end_marker_completes_the_remainder() -> None:
    assembler = BatchAssembler(4, 4, Position())
    offer(assembler, 1, trajectory(1, RNG))
    assert offer(assembler, 2, EndOfRun(reason="done")) is Verdict.END
    assert assembler.complete and len(assembler.batch) == 1
    position = assembler.commit()
    assert position.ended and BatchAssembler(4, 4, position).complete


def test_what_lies_ahead_skips_finished_leases_and_moves_nothing() -> None:
    assembler = BatchAssembler(1, 4, Position())
    offer(assembler, 1, trajectory(1, RNG))
    ahead = assembler.upcoming([trajectory(1, RNG), trajectory(2, RNG), EndOfRun(reason="x"), None])
    assert [one.lease_id for one in ahead] == [lease(2)]
    assert assembler.commit().cursor == "1-0"


def unscorable(**changes: object) -> Message:
    return trajectory(1, RNG, **changes)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (unscorable(lease_id="estimate:5f3a9c01:1"), "no training lease"),
        (
            unscorable(segments=[Segment(kind="prompt", token_ids=[]), trajectory(1, RNG).segments[1]]),
            "no tokens",
        ),
        (unscorable(segments=[Segment(kind="prompt", token_ids=[1, 200]), trajectory(1, RNG).segments[1]]), "vocabul"),
        (unscorable(segments=[Segment(kind="prompt", token_ids=[-1]), trajectory(1, RNG).segments[1]]), "vocabul"),
        (
            unscorable(segments=[Segment(kind="prompt", token_ids=[1] * 90), trajectory(1, RNG).segments[1]]),
            "positions",
        ),
    ],
)
def test_what_the_model_cannot_score_is_refused(message: Message, cause: str) -> None:
    with pytest.raises(InvalidMessage, match=cause):
        check_scorable(message, 128, 80)  # type: ignore[arg-type]


@given(st.permutations(list(range(1, 30))), st.integers(0, 29))
def test_consumed_leases_are_a_set(order: list[int], count: int) -> None:
    consumed = ConsumedLeases()
    for n in order[:count]:
        consumed.add(lease(n))
    again = ConsumedLeases.from_json(consumed.to_json())
    for n in range(1, 30):
        assert (lease(n) in consumed) == (n in order[:count]) == (lease(n) in again)


def test_the_low_water_mark_closes_gaps() -> None:
    consumed = ConsumedLeases()
    for n in (2, 3, 1, 5):
        consumed.add(lease(n))
    assert consumed.to_json() == {"5f3a9c01": [3, [5]]}


EVENTS = st.lists(st.tuples(st.sampled_from(["new", "again", "stone", "bad", "old"]), st.integers(1, 12)), max_size=40)


@given(EVENTS, st.integers(1, 5), st.integers(0, 6))
def test_batches_are_a_function_of_position_and_stream(
    events: list[tuple[str, int]], size: int, restart_after: int
) -> None:
    """A learner that restarts from any committed position makes the same batches as one that never stopped."""
    rng = np.random.default_rng(1)
    made: dict[str, Message | None] = {}
    stream: list[tuple[str, str, Message | None]] = []
    for place, (kind, n) in enumerate(events, start=1):
        message: Message | None = trajectory(n, rng, version=0 if kind == "old" else 8)
        if kind == "stone":
            message = Tombstone(lease_id=lease(n), prompt_id="p", reason="attempts", detail="", attempts=1)
        elif kind == "bad":
            message = None
        elif kind == "again":
            message = made.get(lease(n), message)
        made[lease(n)] = message
        stream.append((f"{place}-0", lease(n), message))

    def batches(position: Position, step: int) -> list[tuple[Position, list[str]]]:
        assembler = BatchAssembler(size, 4, position)
        result = []
        for entry, number, message in stream:
            if int(entry[:-2]) <= int(position.cursor[:-2]):
                continue
            assembler.offer(entry, number, message, b"", "bad", step + len(result) + 5)
            if assembler.complete:
                leases = [one.lease_id for one, _ in assembler.batch]
                result.append((assembler.commit(), leases))
        return result

    whole = batches(Position(), 0)
    trained = [number for _, leases in whole for number in leases]
    assert len(trained) == len(set(trained))
    if restart_after < len(whole):
        position = whole[restart_after][0]
        again = batches(position, restart_after + 1)
        assert [leases for _, leases in again] == [leases for _, leases in whole[restart_after + 1 :]]


def stone(n: int) -> Tombstone:
    return Tombstone(lease_id=lease(n), prompt_id="p", reason="attempts", detail="", attempts=3)


def leases_of(assembler: BatchAssembler) -> list[str]:
    return [one.lease_id for one, _ in assembler.batch]


def test_a_batch_waits_for_whole_groups_in_the_order_in_which_they_become_whole() -> None:
    assembler = BatchAssembler(4, 4, Position(), group_size=2)
    verdicts = [offer(assembler, n, trajectory(n, RNG)) for n in (1, 3, 5, 4, 6)]
    assert verdicts == [Verdict.WAITING] * 3 + [Verdict.TRAINABLE] * 2
    assert assembler.complete and leases_of(assembler) == [lease(n) for n in (3, 4, 5, 6)]
    assert [one.lease_id for one, _ in assembler.waiting()] == [lease(1)]
    position = assembler.commit()
    assert position.cursor == "0-0", "the entry of lease 1 is read again after a crash"
    again = BatchAssembler(4, 4, position, group_size=2)
    assert offer(again, 1, trajectory(1, RNG)) is Verdict.WAITING
    assert offer(again, 3, trajectory(3, RNG)) is Verdict.DUPLICATE


def test_a_group_trains_with_what_is_left_of_it() -> None:
    """A failed member and a stale one leave two of four; the batch of two groups has six."""
    assembler = BatchAssembler(8, 2, Position(), group_size=4)
    for n in range(1, 5):
        offer(assembler, n, trajectory(n, RNG, version=6), step=6)
    offer(assembler, 5, stone(5), step=6)
    offer(assembler, 6, trajectory(6, RNG, version=3, reward=1.0), step=6)
    assert offer(assembler, 7, trajectory(7, RNG, version=6), step=6) is Verdict.WAITING
    decision = assembler.offer("8-0", lease(8), trajectory(8, RNG, version=6), b"", "", 6)
    assert decision.verdict is Verdict.TRAINABLE
    assert [(one.lease_id, one.outcome) for one in decision.updates] == [(lease(6), "stale")]
    assert assembler.complete and leases_of(assembler) == [lease(n) for n in (1, 2, 3, 4, 7, 8)]
    assert assembler.commit().consumed.to_json() == {"5f3a9c01": [8, []]}


def test_damage_counts_as_a_failed_member() -> None:
    assembler = BatchAssembler(2, 4, Position(), group_size=2)
    decision = assembler.offer("1-0", lease(1), None, b"x", "damaged", 0)
    assert decision.dead_letter == "damaged" and [one.outcome for one in decision.updates] == ["failed"]
    assert offer(assembler, 2, trajectory(2, RNG)) is Verdict.TRAINABLE
    assert assembler.complete and len(assembler.batch) == 1


def test_a_batch_of_nothing_goes_on_to_the_next_group_and_the_last_one_ends_with_the_leases() -> None:
    """Two batches of one group; the first group is lost, so the second batch never fills."""
    assembler = BatchAssembler(2, 4, Position(), group_size=2, total_leases=4)
    for n in (1, 2):
        offer(assembler, n, stone(n))
    assert not assembler.complete
    for n in (3, 4):
        offer(assembler, n, trajectory(n, RNG))
    assert assembler.complete and leases_of(assembler) == [lease(3), lease(4)]
    position = assembler.commit()
    again = BatchAssembler(2, 4, position, group_size=2, total_leases=4)
    assert assembler.complete and again.complete and not again.batch, "nothing more will come"
    assert not position.ended, "a longer run goes on from here"


def test_the_end_takes_groups_that_are_not_whole() -> None:
    assembler = BatchAssembler(4, 4, Position(), group_size=4)
    offer(assembler, 1, trajectory(1, RNG))
    assert offer(assembler, 2, EndOfRun(reason="done")) is Verdict.END
    assert leases_of(assembler) == [lease(1)] and assembler.commit().cursor == "2-0"


GROUPED = st.lists(
    st.tuples(st.sampled_from(["young", "old", "stone", "bad"]), st.booleans()), min_size=24, max_size=24
)


@given(GROUPED, st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4))
def test_batches_of_groups_are_a_function_of_position_and_stream(
    ends: list[tuple[str, bool]], chance: random.Random, size: int, groups: int, restart_after: int
) -> None:
    """Leases 1 … 24 end in any order and some twice; a restart anywhere makes the same batches and stale updates."""
    order = [n for n, (_, twice) in enumerate(ends, start=1) for _ in range(1 + twice)]
    chance.shuffle(order)
    rng = np.random.default_rng(1)

    def entry(n: int) -> Message | None:
        kind = ends[n - 1][0]
        if kind == "bad":
            return None
        return stone(n) if kind == "stone" else trajectory(n, rng, version=0 if kind == "old" else 9)

    stream = [(place, n, entry(n)) for place, n in enumerate(order, start=1)]

    def batches(position: Position, step: int) -> list[tuple[Position, list[str], list[str]]]:
        assembler = BatchAssembler(size * groups, 4, position, size)
        found = []
        for place, n, message in stream:
            if place <= int(position.cursor[:-2]):
                continue
            assembler.offer(f"{place}-0", lease(n), message, b"", "bad", step + len(found) + 5)
            if assembler.complete:
                stale = [one.lease_id for one in assembler.stale]
                batch = leases_of(assembler)
                found.append((assembler.commit(), batch, stale))
        return found

    whole = batches(Position(), 0)
    trained = [number for _, batch, _ in whole for number in batch]
    assert len(trained) == len(set(trained))
    for _, batch, _ in whole:
        places: dict[str, list[int]] = {}
        for place, number in enumerate(batch):
            places.setdefault(group_of(number, size), []).append(place)
        assert all(p == list(range(p[0], p[0] + len(p))) for p in places.values()), "a group stands together"
    if restart_after < len(whole):
        again = batches(whole[restart_after][0], restart_after + 1)
        assert [found[1:] for found in again] == [found[1:] for found in whole[restart_after + 1 :]]
