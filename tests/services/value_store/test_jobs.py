"""A job's items: leased once each, again after a failure, bounded, and the same after they are read back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.value_store.jobs import MAX_RETRIES, ItemResult, Job
from singlestream.contracts import Sampling

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0)


def make_job(prompts: int = 2, n: int = 3) -> Job:
    return Job("0123456789ab", "estimate", [f"{i:016x}" for i in range(prompts)], n, SAMPLING, 1.0)


def scored(reward: float, version: int = 4) -> ItemResult:
    return ItemResult(lease_id="l", reward=reward, version=version, turns=1, tool_calls=2, response_tokens=10)


def test_items_are_leased_in_order_and_once() -> None:
    job = make_job()
    assert job.peek(4) == [0, 1, 2, 3]
    for item in (0, 1):
        job.lease(item)
    assert job.peek(10) == [2, 3, 4, 5]
    assert job.prompt_of(2) == job.prompt_ids[0]
    assert job.prompt_of(3) == job.prompt_ids[1]
    assert job.outstanding() == 2


def test_a_failed_item_comes_back_a_bounded_number_of_times() -> None:
    job = make_job(1, 1)
    for failures in range(1, MAX_RETRIES + 2):
        assert job.peek(5) == [0]
        job.lease(0)
        assert job.peek(5) == []
        assert job.next_failure(0) == failures
        job.record(0, ItemResult(lease_id="l", failures=failures))
    assert job.finished
    assert job.failed == 1
    assert job.peek(5) == []
    rewards = job.offline_rewards(0)
    assert rewards is not None
    assert len(rewards) == 0


def test_a_prompts_rewards_are_there_with_its_last_item() -> None:
    job = make_job(2, 2)
    for item, reward in ((0, 1.0), (3, 0.5)):
        job.lease(item)
        job.record(item, scored(reward))
        assert job.offline_rewards(item) is None
    job.lease(1)
    job.record(1, scored(0.0))
    rewards = job.offline_rewards(1)
    assert rewards is not None
    assert rewards.tolist() == [1.0, 0.0]


def test_totals() -> None:
    job = make_job(1, 2)
    job.record(0, scored(1.0, version=4))
    job.record(1, scored(0.0, version=5))
    job.record(1, scored(1.0, version=6))  # settled already
    assert job.summary() == {
        "done": 2,
        "failed": 0,
        "reward_mean": 0.5,
        "tool_calls_mean": 2.0,
        "response_tokens_mean": 10.0,
        "versions": {"4": 1, "5": 1},
    }
    job.finished_at_s = 2.0
    again = Job.unpack(job.pack())
    assert again.finished
    assert again.summary() == job.summary()


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["lease", "score", "fail"])), max_size=60))
def test_a_job_read_back_has_the_same_items_left(events: list[tuple[int, str]]) -> None:
    job, stored, leased = make_job(), dict[int, ItemResult](), set[int]()
    for item, event in events:
        if event == "lease" and item in job.peek(6):
            job.lease(item)
            leased.add(item)
        elif event != "lease" and item in leased:
            leased.discard(item)
            result = scored(0.5) if event == "score" else ItemResult(lease_id="l", failures=job.next_failure(item))
            job.record(item, result)
            stored[item] = result
    again = Job.unpack(job.pack())
    for item, result in stored.items():
        again.record(item, result)
    for item in leased:
        again.lease(item)
    assert sorted(again.peek(6)) == sorted(job.peek(6))
    assert (again.done, again.failed, again.outstanding()) == (job.done, job.failed, job.outstanding())
    assert np.array_equal(again.rewards, job.rewards, equal_nan=True)
