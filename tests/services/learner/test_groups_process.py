"""GRPO, several updates a batch and exact drift, in one learner process on a recorded stream, through a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from redis import Redis

from singlestream.contracts import EndOfRun, Message, Tombstone
from singlestream.streams import Keys
from tests.services.learner.recorded import Run, append, lease, trajectory
from tests.services.learner.test_learner_process import fingerprint, updates
from tests.services.learner.waiting import resume_step, wait_until

BATCH, GROUP, STEPS = 8, 4, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"total_steps": STEPS},
    "learner": {"advantage": "grpo", "updates_per_batch": 2, "truncation": 0, "checkpoint_every": 1},
    "value_store": {"group_size": GROUP, "retention": "kl"},
}


def grouped_stream() -> list[list[Message]]:
    """Entries of each batch: its groups interleaved, a member of the next batch early, one failed, one group equal."""
    rng = np.random.default_rng(3)
    batches: list[list[Message]] = []
    for step in range(STEPS):
        numbers = range(BATCH * step + 1, BATCH * (step + 1) + 1)
        entries: list[Message] = [
            trajectory(
                n,
                rng,
                version=step,
                prompt_id=f"p{(n - 1) % BATCH // GROUP}",
                reward=float(n % 2 and n % BATCH < GROUP),
            )
            for n in numbers
        ]
        entries = [entries[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
        batches.append(entries)
    failed = lease(BATCH + 2)
    batches[1][2] = Tombstone(lease_id=failed, prompt_id="p0", reason="attempts", detail="", attempts=3)
    batches[0].insert(3, batches[2].pop(0))  # its group is whole two batches later
    return batches


@pytest.mark.timeout(400)
def test_groups_with_two_updates_a_batch_go_on_after_a_crash_and_measure_exact_drift(
    sync_redis: Redis, keys: Keys, make_run: Callable[..., Run]
) -> None:
    undisturbed = make_run("u", **SETTINGS)
    stream = grouped_stream()
    end = EndOfRun(reason="recorded")
    append(sync_redis, Keys(undisturbed.name), [*(one for batch in stream for one in batch), end])
    undisturbed.finish()
    steps = undisturbed.steps()
    assert [s["trajectories"] for s in steps] == [8, 7, 8, 8]
    assert [(s["groups"], s["degenerate_groups"]) for s in steps] == [(2, 1)] * STEPS
    assert [s["drift_noise"] for s in steps] == [0.0] * STEPS, "the same version twice reads the same on CPU"
    assert all(s["approx_kl"] > 0 for s in steps), "the second update of a batch is off its old policy"

    run = make_run(**SETTINGS)
    # the value store's part: leases are outstanding, and a prompt's anchor is what its last closed lease left
    sync_redis.hset(keys.outstanding("train"), mapping={lease(n): b"" for n in range(1, BATCH * STEPS + 1)})
    process = run.start()
    append(sync_redis, keys, stream[0])
    # the anchors that follow are of step 1: a resume from before it would meet them too early
    wait_until(lambda: len(updates(sync_redis, keys)) == BATCH and resume_step(sync_redis, keys) == 1, process)
    for prompt in ("p0", "p1"):
        last = [u.lease_id for u in updates(sync_redis, keys) if u.prompt_id == prompt][-1]
        sync_redis.hset(keys.anchor_of, prompt, last)
    append(sync_redis, keys, stream[1])
    wait_until(lambda: len(run.steps()) >= 2, process)
    process.kill()
    process.wait()
    append(sync_redis, keys, [*stream[2], *stream[3], end])
    run.finish()

    assert fingerprint(run) == fingerprint(undisturbed)
    assert {s["lineage"] for s in run.steps()} == {1, 2}
    assert [s["anchors"] for s in run.steps()[:2]] == [0, 7]
    exact = {u.lease_id: u.kl for u in updates(sync_redis, keys)}
    second = [exact[lease(n)] for n in range(BATCH + 1, 2 * BATCH + 1) if n != BATCH + 2]
    assert all(exact[lease(n)] is None for n in range(1, BATCH + 1)), "a first visit has nothing to compare with"
    assert all(kl is not None and 0 < kl < 1 for kl in second)
    for group in (second[: GROUP - 1], second[GROUP - 1 :]):
        assert group == [group[0]] * len(group), "one anchor a prompt, scored once for its group"
    assert second[0] != pytest.approx(second[-1], abs=1e-5)
    seen = run.steps("evidence")
    assert {one["lease_id"]: one["drift"] for one in seen if one["step"] == 2} == pytest.approx(
        {lease(n): exact[lease(n)] for n in range(BATCH + 1, 2 * BATCH + 1) if n != BATCH + 2}
    )
    assert len({(one["step"], one["lease_id"]) for one in seen}) == len(seen) == BATCH * STEPS - 1
