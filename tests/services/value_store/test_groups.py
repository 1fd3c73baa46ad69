"""Groups of leases of one prompt, and what the store does for `kl` retention."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from services.value_store import posterior
from services.value_store.admission import TRAINING_ENDS, Admission
from services.value_store.store import Store
from singlestream.contracts import PosteriorUpdate, group_of
from singlestream.streams import Keys
from singlestream.streams.anchors import is_anchored
from tests.services.value_store.world import World, evidence, make_config, make_prompts, settle, wake

GRPO = {"learner": {"advantage": "grpo"}, "value_store": {"training": "running", "group_size": 4}}


async def start(redis: Redis, keys: Keys, prompts: int = 12, **changes: Any) -> tuple[Store, World]:
    store, world = Store(make_config(keys, **changes), redis), World(redis, keys)
    await world.start()
    await world.publish(0)
    await wake(store)
    await store.upsert(make_prompts(prompts), [None] * prompts)
    return store, world


async def test_a_group_is_leased_whole_and_its_prompt_waits_for_its_last_member(redis: Redis, keys: Keys) -> None:
    """Batch 8 and staleness 1 admit four groups of four; batch 8 needs two prompts."""
    store, world = await start(redis, keys, prompts=4, train_batch_size=8, total_steps=3, **GRPO)
    assert await store.issue(1) == 4, "a group more than was asked for, rather than none"
    assert await store.issue(100) == 12
    played = await world.play(lambda lease: float(lease.lease_id.endswith("1")))
    groups = Counter((one.prompt_id, group_of(one.lease_id, 4)) for one in played)
    assert sorted(groups.values()) == [4] * 4 and len({prompt for prompt, _ in groups}) == 4
    await world.learner.send_updates([evidence(one) for one in played[:3]])
    await settle(store)
    assert store.memory.table.in_flight.max() == 4 and await store.issue(100) == 0
    assert store.memory.admission.binding == "run-ahead", "three free slots are no group"
    await world.learner.send_updates([evidence(one) for one in played[3:7]])
    await settle(store)
    again = Store(make_config(keys, train_batch_size=8, total_steps=3, **GRPO), redis)
    await wake(again)
    assert sorted(again.memory.table.in_flight) == sorted(store.memory.table.in_flight) == [0, 1, 4, 4]
    assert await again.issue(100) == 4
    assert {held.lease.prompt_id for held in await world.take()} == {played[0].prompt_id}


async def test_lost_members_are_not_made_up_for(redis: Redis, keys: Keys) -> None:
    """The run is over once each of its leases has ended: the learner trains what is left of a group."""
    store, world = await start(redis, keys, train_batch_size=8, total_steps=1, **GRPO)
    assert await store.issue(100) == 8
    played = await world.play()
    lost = PosteriorUpdate(lease_id=played[0].lease_id, prompt_id=played[0].prompt_id, outcome="failed")
    updates = [lost, evidence(played[1], "stale"), *(evidence(one) for one in played[2:])]
    await world.learner.send_updates(updates[:-1])
    await settle(store)
    assert store.memory.state == "running" and await store.issue(100) == 0
    await world.learner.send_updates(updates[-1:])
    await settle(store)
    assert store.memory.state == "finished"
    counts = (await world.ledger())["train"]
    assert counts.ended == {"trained": 6, "stale": 1, "failed": 1, "scored": 0, "cancelled": 0}


async def anchors(redis: Redis, keys: Keys) -> tuple[dict[bytes, bytes], dict[bytes, bytes], int]:
    """Kept responses by lease, lease by prompt, and the bytes booked, which must be those that are there."""
    kept, of = await redis.hgetall(keys.anchors), await redis.hgetall(keys.anchor_of)
    booked = int(await redis.hget(keys.anchor_counts, "bytes") or 0)
    assert booked == sum(map(len, kept.values())) and await redis.zcard(keys.anchor_ages) == len(kept)
    return kept, of, booked


async def test_an_anchor_is_of_the_lease_that_the_posterior_counted_last(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, 4, value_store={"training": "running", "retention": "kl"})
    leases: list[list[str]] = []
    for visit in range(3):
        await world.publish(visit, z=0.1 * visit)
        await settle(store)
        await store.issue(4)
        played = sorted(await world.play(), key=lambda one: one.prompt_id)
        leases.append([one.lease_id for one in played])
        if visit != 1:  # as if the second visit's had been evicted at once
            await world.learner.put_anchors([(one.lease_id, b"x" * 10) for one in played], 1000)
        before = {0: [None] * 4, 1: [b"x" * 10] * 4, 2: [None] * 4}[visit]
        assert await world.learner.anchors([one.prompt_id for one in played]) == before
        kl = {0: None, 1: 0.006, 2: None}[visit]
        await world.learner.send_updates([evidence(one).model_copy(update={"kl": kl}) for one in played])
        await settle(store)
    kept, of, booked = await anchors(redis, keys)
    assert sorted(of.values()) == sorted(kept) == sorted(lease.encode() for lease in leases[2])
    assert booked == 40
    alpha, beta = posterior.update(0.5, 0.5, 0.96, 1.0)
    alpha, beta = posterior.update(alpha, beta, 2**-0.1, 1.0)  # exact drift 0.006 of 0.06
    alpha, beta = posterior.update(alpha, beta, 2**-0.1, 1.0)  # the clock, which has gone on by 0.1
    assert store.memory.table.alpha == pytest.approx([float(alpha)] * 4, abs=1e-12)
    assert store.memory.table.beta == pytest.approx([float(beta)] * 4, abs=1e-12)
    assert store.memory.on_clock == 4

    await world.learner.put_anchors([(leases[0][0], b"closed long ago")], 1000)
    assert len(await redis.hgetall(keys.anchors)) == 4, "a lease that is closed keeps nothing"


async def test_anchors_stay_within_their_bytes_the_oldest_go(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, 8, value_store={"training": "running", "retention": "kl"})
    await store.issue(8)
    played = await world.play()
    await world.learner.put_anchors([(one.lease_id, bytes(10)) for one in played], 45)
    await world.learner.put_anchors([(played[-1].lease_id, bytes(99))], 45)
    kept, of, booked = await anchors(redis, keys)
    assert set(kept) == {one.lease_id.encode() for one in played[4:]} and booked == 40 and not of
    assert await redis.hget(keys.anchor_counts, "evicted") == b"4"

    await world.learner.send_updates([evidence(one) for one in played])
    await settle(store)
    await store.issue(8)
    again = await world.play()
    await world.learner.put_anchors([(one.lease_id, bytes(10)) for one in again], 45)
    await world.learner.send_updates([evidence(one) for one in again])  # the anchors before have been evicted
    await settle(store)
    kept, of, booked = await anchors(redis, keys)
    assert set(kept) == set(of.values()) == {one.lease_id.encode() for one in again[4:]} and booked == 40


def test_the_share_of_prompts_with_an_anchor() -> None:
    names = [f"{number:016x}" for number in range(20_000)]
    assert np.mean([is_anchored(name, 0.05) for name in names]) == pytest.approx(0.05, abs=0.01)
    assert all(is_anchored(name, 1.0) for name in names) and not any(is_anchored(name, 0.0) for name in names)


def test_a_groups_leases_follow_each_other() -> None:
    assert [group_of(f"train:5f3a9c01:{n}", 4) for n in (1, 4, 5, 8)] == ["5f3a9c01:1"] * 2 + ["5f3a9c01:2"] * 2
    assert group_of("train:5f3a9c01:7", 1) == "5f3a9c01:7"


async def test_a_leases_baseline_is_drawn_towards_the_last_batchs_mean(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, 4, value_store={"training": "running", "shrinkage": 4.0})
    await store.issue(4)
    played = await world.play(lambda lease: float(lease.lease_id.endswith("1")))
    assert {one.v_hat for one in played} == {0.5}, "there is no mean yet"
    await world.train()
    await settle(store)
    await store.issue(4)
    v_hat = {held.lease.prompt_id: held.lease.v_hat for held in await world.take()}
    rho = 0.96
    for one in played:
        alpha, beta = posterior.update(0.5, 0.5, rho, one.reward)
        assert v_hat[one.prompt_id] == pytest.approx(float((alpha + 4 * 0.25) / (alpha + beta + 4)))


ENDS = st.lists(st.integers(0, 3), max_size=60)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 4), ENDS)
def test_admission_of_groups(size: int, groups: int, staleness: int, steps: int, ends: list[int]) -> None:
    """Whatever ends how: both bounds hold, what is admitted is whole groups, and the run comes to its end."""
    batch = size * groups
    admission = Admission(batch, staleness, steps, size)
    for end in [*ends, *([0] * batch * steps)]:
        assert admission.headroom % size == 0
        admission.issue(admission.headroom)
        assert admission.outstanding <= (staleness + 1) * batch
        if admission.outstanding:
            admission.end(TRAINING_ENDS[end])
    assert admission.finished and admission.outstanding == 0
    assert size == 1 or admission.leased == steps * batch
