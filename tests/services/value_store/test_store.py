"""The one writer on a real Redis: a lease counts once, the ledger adds up, memory follows Redis."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from redis.asyncio import Redis

from services.value_store import loops, posterior
from services.value_store.ending import end
from services.value_store.evidence import decode_entries
from services.value_store.jobs import Job
from services.value_store.memory import load_memory
from services.value_store.recent import Recent
from services.value_store.store import NotReady, Store
from services.value_store.table import Table, new_record
from singlestream.contracts import EndOfRun, PosteriorUpdate, Sampling, decode_closing, encode
from singlestream.errors import Fenced
from singlestream.streams import Keys
from tests.services.value_store.world import (
    World,
    evidence,
    make_config,
    make_prompts,
    make_trajectory,
    settle,
    until,
    wake,
)

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0)


async def start(redis: Redis, keys: Keys, prompts: int = 20, **changes: object) -> tuple[Store, World]:
    """A store with prompts, running, at version 0; nothing is leased yet."""
    store, world = Store(make_config(keys, **changes), redis), World(redis, keys)
    await world.start()
    await wake(store)
    await store.upsert(make_prompts(prompts), [None] * prompts)
    await world.publish(0)
    await store.set_training("running")
    await settle(store)
    return store, world


def same_memory(a: Store, b: object) -> None:
    """Both mirror the same Redis."""
    one, two = a.memory, b
    assert one.ledger() == two.ledger()  # type: ignore[attr-defined]
    assert one.open == two.open  # type: ignore[attr-defined]
    assert one.cursors == two.cursors  # type: ignore[attr-defined]
    assert one.state == two.state  # type: ignore[attr-defined]
    jobs, others = one.jobs, two.jobs  # type: ignore[attr-defined]
    assert {name: (job.finished_at_s, job.error) for name, job in jobs.items()} == {
        name: (job.finished_at_s, job.error) for name, job in others.items()
    }
    mine = sorted(
        zip(one.table.id_number, one.table.records(np.arange(len(one.table))), one.table.in_flight, strict=True)
    )
    other = two.table  # type: ignore[attr-defined]
    assert mine == sorted(zip(other.id_number, other.records(np.arange(len(other))), other.in_flight, strict=True))


async def test_a_lease_names_its_prompts_source(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, prompts=2)
    await store.upsert(make_prompts(2, source="other"), [None] * 2)
    assert await store.issue(4) == 4
    assert sorted(held.lease.source for held in await world.take()) == ["other", "other", "s", "s"]


async def test_a_lease_counts_once(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    assert await store.issue(100) == 8  # (max_staleness + 1) · batch
    [first, *others] = await world.play(lambda _: 1.0)
    assert first.v_hat == 0.5
    updates = [evidence(first)] * 3 + [evidence(one) for one in others] + [evidence(first)]
    await world.learner.send_updates(updates)
    await settle(store)
    await world.learner.send_updates(updates)
    await settle(store)
    row = store.memory.table.row(first.prompt_id)
    assert row is not None
    alpha, beta = posterior.update(0.5, 0.5, 0.96, 1.0)
    assert store.memory.table.alpha[row] == alpha
    assert store.memory.table.beta[row] == beta
    assert store.memory.table.visits[row] == 1
    assert not store.memory.table.in_flight.any()
    counts = (await world.ledger())["train"]
    assert (counts.leased, counts.outstanding, counts.ended["trained"]) == (8, 0, 8)
    assert store.memory.duplicates == 3 + 11
    assert await redis.xlen(keys.posterior_updates) == 1  # trimmed below the cursor


async def test_prompts_in_flight_are_not_drawn(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, prompts=6)
    assert await store.issue(100) == 6
    assert await store.issue(100) == 0
    leases = [held.lease for held in await world.take()]
    assert len({lease.prompt_id for lease in leases}) == 6
    assert sorted(lease.lease_id.split(":")[2] for lease in leases) == list("123456")
    assert {lease.lease_id.split(":")[1] for lease in leases} == {store.memory.epoch}
    assert {(lease.version, lease.lineage) for lease in leases} == {(0, 1)}


async def test_evaluation_prompts_are_never_trained_on(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, prompts=4)
    held_out = make_prompts(30, split="eval", source="held out")
    await store.upsert(held_out, [None] * 30)
    assert await store.issue(100) == 4
    assert {held.lease.prompt_id for held in await world.take()} == {p.prompt_id for p in make_prompts(4)}


async def test_drift_goes_into_the_posterior_and_the_history(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, prompts=4)
    for version, z in ((0, 0.0), (1, 0.1)):
        await world.publish(version, z=z)
        await settle(store)
        await store.issue(4)
        await world.play(lambda lease: float(lease.version == 0))
        await world.train()
        await settle(store)
    alpha, beta = posterior.update(*posterior.update(0.5, 0.5, 0.96, 1.0), 2**-0.1, 0.0)
    assert store.memory.table.alpha == pytest.approx([float(alpha)] * 4, abs=1e-12)
    assert store.memory.table.beta == pytest.approx([float(beta)] * 4, abs=1e-12)
    assert await redis.llen(keys.history(store.memory.table.id(0))) == 2


async def test_z_is_looked_up_when_evidence_overtakes_the_publication(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, prompts=4)
    await store.issue(4)
    [held, *_] = await world.take()
    trajectory = make_trajectory(held.lease, 1.0, version=3)
    await world.replica.emit(held, trajectory)
    await redis.hset(keys.clock, "3", "0.77")
    await world.learner.send_updates([evidence(trajectory)])
    entries = await store.streams.read_stream(keys.posterior_updates, "0-0", 10, 1)
    await store.take_updates(store.memory.epoch, decode_entries(entries, decode_closing))
    row = store.memory.table.row(trajectory.prompt_id)
    assert store.memory.table.z_last[row] == 0.77


async def test_what_names_the_wrong_prompt_changes_nothing(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    await store.issue(1)
    [trajectory] = await world.play()
    wrong = evidence(trajectory).model_copy(update={"prompt_id": "f" * 16})
    await world.learner.send_updates([wrong])
    await redis.xadd(keys.posterior_updates, {"id": "", "m": b"rubbish"})
    await redis.xadd(keys.posterior_updates, {"id": "", "m": encode(EndOfRun(reason="x"))})
    scored = PosteriorUpdate(lease_id=trajectory.lease_id, prompt_id=trajectory.prompt_id, outcome="scored")
    await world.learner.send_updates([scored])
    await settle(store)
    assert (await world.ledger())["train"].outstanding == 1
    assert store.memory.table.visits.sum() == 0
    letters = await redis.xrange(keys.dead_letters)
    assert [bool(fields[b"reason"]) for _, fields in letters] == [True] * 4
    await world.train()
    await settle(store)
    assert (await world.ledger())["train"].ended["trained"] == 1


async def test_failures_close_their_leases(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    await store.issue(3)
    failed, damaged, stale = await world.take()
    await world.replica.fail(failed, "grader_error", "boom")
    await redis.xadd(keys.posterior_updates, {"id": damaged.lease.lease_id, "m": b"rubbish"})
    trajectory = make_trajectory(stale.lease, 1.0)
    await world.learner.send_updates([evidence(trajectory, "stale")])
    await settle(store)
    counts = (await world.ledger())["train"]
    assert counts.ended == {"trained": 0, "stale": 1, "failed": 2, "scored": 0, "cancelled": 0}
    assert store.memory.table.visits.sum() == 1
    assert store.memory.admission.outstanding == 0


async def test_a_second_update_of_a_prompt_waits_for_the_next_change(redis: Redis, keys: Keys) -> None:
    """Two leases of one prompt are never outstanding in one life of Redis; after one lost its tail they may be."""
    store, world = await start(redis, keys, prompts=4)
    await store.issue(1)
    [first] = await world.play()
    await world.read()
    row = store.memory.table.row(first.prompt_id)
    assert row is not None
    number = first.lease_id[:-1] + "9"
    record = store.memory.open["train"][first.lease_id].pack()
    await redis.hset(keys.outstanding("train"), number, record)
    await redis.hincrby(keys.ledger, "train:leased", 1)
    await wake(store)
    again = evidence(first).model_copy(update={"lease_id": number, "reward": 0.0})
    await world.learner.send_updates([evidence(first), again])
    await settle(store)
    alpha, _ = posterior.update(*posterior.update(0.5, 0.5, 0.96, 1.0), 0.96, 0.0)
    assert store.memory.table.visits[row] == 2
    assert store.memory.table.alpha[row] == pytest.approx(float(alpha))


async def test_memory_is_what_redis_holds(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    job = Job("0123456789ab", "evaluate", [p.prompt_id for p in make_prompts(3)], 2, SAMPLING, 1.0)
    await store.create_job(job)
    await loops._wanted(store)
    await store.issue(7)
    for held in (await world.take())[::2]:
        await world.replica.emit(held, make_trajectory(held.lease, 1.0))
    await world.train()
    await settle(store)
    await store.issue(5)
    before = store.memory.jobs[job.job_id].summary()
    other = Store(store.config, redis)
    memory = await load_memory(other.streams, other.config)
    same_memory(store, memory)
    assert memory.jobs[job.job_id].summary() == before
    assert memory.jobs[job.job_id].outstanding() == store.memory.jobs[job.job_id].outstanding()


async def test_a_second_store_takes_over_and_the_first_writes_nothing(redis: Redis, keys: Keys) -> None:
    first, world = await start(redis, keys)
    await first.issue(4)
    second = Store(first.config, redis)
    await wake(second)
    await world.play()
    await world.train()
    before = await redis.hgetall(keys.values), await redis.hgetall(keys.ledger)
    for attempt in (
        lambda: settle(first),
        lambda: first.issue(4),
        lambda: first.upsert(make_prompts(1, source="new"), [None]),
        lambda: first.set_training("paused"),
    ):
        first._trouble = None
        with pytest.raises(Fenced, match="another value store has taken over"):
            await attempt()
    with pytest.raises(Fenced):
        await wake(first)  # nor does it take the fence back
    assert before == (await redis.hgetall(keys.values), await redis.hgetall(keys.ledger))
    await settle(second)
    assert (await world.ledger())["train"].ended["trained"] == 4


async def test_of_two_stores_that_start_together_one_goes_on_and_the_other_says_why(redis: Redis, keys: Keys) -> None:
    stores = [Store(make_config(keys), redis) for _ in range(2)]
    tasks = {
        asyncio.create_task(work): store for store in stores for work in (store.keep_ready(), loops.issue_leases(store))
    }
    try:
        [fenced], _ = await asyncio.wait(tasks, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(Fenced, match="another value store has taken over"):
            await fenced
        [winner] = [store for store in stores if store is not tasks[fenced]]
        await until(lambda: winner.waiting_for is None, "the other store")
        await winner.upsert(make_prompts(1), [None])
        assert await redis.get(keys.fence("value_store")) == winner.memory.epoch.encode()
    finally:
        await end(list(tasks))


async def test_a_part_that_is_refused_while_the_next_is_planned_takes_memory_with_it(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, world = await start(redis, keys)
    monkeypatch.setattr("services.value_store.store.ENTRIES_PER_SCRIPT", 2)
    await store.issue(7)
    played = await world.play()
    lost = played[3].lease_id  # in the second of four parts
    await redis.hdel(keys.outstanding("train"), lost)
    await redis.hincrby(keys.ledger, "train:leased", -1)
    await world.train()
    with pytest.raises(NotReady, match="differs from this store's memory"):
        await settle(store)
    counts = (await world.ledger())["train"]
    assert (counts.ended["trained"], counts.outstanding) == (2, 4), (
        "the first part stands, and nothing behind the second"
    )
    await wake(store)
    await settle(store)
    counts = (await world.ledger())["train"]
    assert (counts.leased, counts.ended["trained"], store.memory.duplicates) == (6, 6, 1)
    other = Store(store.config, redis)
    same_memory(store, await load_memory(other.streams, other.config))


async def test_memory_that_differs_from_redis_is_forgotten(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    await store.issue(2)
    epoch = store.memory.epoch
    [first, _] = await world.play()
    await redis.hdel(keys.outstanding("train"), first.lease_id)  # as after a lost tail of the append-only file
    await redis.hincrby(keys.ledger, "train:leased", -1)
    await world.train()
    with pytest.raises(NotReady, match="differs from this store's memory"):
        await settle(store)
    assert store.waiting_for is not None
    with pytest.raises(NotReady):
        await store.issue(1)
    await wake(store)
    await settle(store)
    counts = (await world.ledger())["train"]
    assert (counts.leased, counts.ended["trained"]) == (1, 1)
    assert store.memory.duplicates == 1
    assert store.memory.epoch != epoch


async def test_a_moved_cursor_stops_a_change(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    await store.issue(1)
    await world.play()
    await world.train()
    await redis.hset(keys.cursors, keys.posterior_updates, "1-1")
    with pytest.raises(NotReady, match="the cursor of"):
        await settle(store)
    assert (await world.ledger())["train"].outstanding == 1


async def test_a_reader_that_forgets_its_cancellation_does_not_hold_the_store_up(redis: Redis, keys: Keys) -> None:
    """As redis-py's may on Python 3.11, where the stream is busy."""
    store, world = await start(redis, keys)
    await store.issue(4)
    await world.play()
    await world.train()
    await redis.hset(keys.cursors, keys.posterior_updates, "1-1")  # the first change is refused
    read, forgotten = store.streams.read_stream, False

    async def forgetful(stream: str, after: str, count: int, block_ms: int | None) -> list[tuple[str, bytes, bytes]]:
        nonlocal forgotten
        more = [("9-9", b"", b"")]
        if after == "9-9":
            return more  # as long as there is room
        if store.rebuilds == 1 and after != "0-0":
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                forgotten = True
                return more
        return await read(stream, after, count, block_ms)

    store.streams.read_stream = forgetful  # type: ignore[method-assign]
    tasks = [asyncio.create_task(work) for work in (store.keep_ready(), loops.follow_updates(store))]
    try:
        await until(lambda: store.memory.ended["train"].get("trained") == 4, "the updates, after the doubt")
        assert forgotten
    finally:
        await end(tasks)


async def test_a_restarted_redis_is_noticed_by_the_write_itself(redis: Redis, keys: Keys) -> None:
    store, _ = await start(redis, keys)
    await redis.script_flush()  # what a restart does to the script cache
    with pytest.raises(NotReady, match="Redis has restarted"):
        await store.issue(1)
    await wake(store)
    assert await store.issue(1) == 1


def test_v_hat_of_all_rows_is_computed_only_where_a_snapshot_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    table, recent, computed = Table(), Recent(), []
    table.put(["0" * 16], [new_record(0.5, 0.5, "train", "s", 0.0)])
    monkeypatch.setattr(Table, "v_hat", property(lambda self: computed.append(1) or posterior.v_hat([0.5], [0.5])))
    for now_s in (0.0, 1.0, 4.9, 5.0, 6.0):
        recent.snapshot(now_s, table)
    assert len(computed) == len(recent.snapshots) == 2


async def test_no_training_lease_before_its_time(redis: Redis, keys: Keys) -> None:
    store, world = Store(make_config(keys), redis), World(redis, keys)
    await world.start()
    await wake(store)
    await store.upsert(make_prompts(2), [None] * 2)
    assert store.training_blocked_by() == "training to be set running (it is paused)"
    await store.set_training("running")
    assert store.training_blocked_by() == "the learner's first policy version"
    await world.publish(0)
    await settle(store)
    assert store.training_blocked_by() == "4 prompts of split train, one batch (there are 2)"
    await store.upsert(make_prompts(4), [None] * 4)
    assert store.training_blocked_by() is None
    store.memory_full = True
    assert "maxmemory" in (store.training_blocked_by() or "")
    assert await store.issue(5) == 0
    store.memory_full = False
    assert await store.issue(5) == 4
    await store.set_training("paused")
    await wake(store)
    assert store.memory.state == "paused"


async def test_an_estimation_sets_priors_once(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys)
    await store.issue(1)
    [visited] = await world.play()
    await world.train()
    await settle(store)
    await store.set_training("paused")
    ids = [visited.prompt_id, *[p.prompt_id for p in make_prompts(3) if p.prompt_id != visited.prompt_id][:2]]
    await store.create_job(Job("0123456789ab", "estimate", ids, 3, SAMPLING, 1.0))
    before = store.memory.table.alpha[store.memory.table.row(visited.prompt_id)]
    assert await store.issue(100) == 9
    rewards = {ids[0]: [1.0] * 3, ids[1]: [1.0, 0.0, 0.5], ids[2]: [0.0] * 3}
    await world.play(lambda lease: rewards[lease.prompt_id].pop())
    await settle(store)
    table = store.memory.table
    rows = [table.row(one) for one in ids]
    assert table.alpha[rows[0]] == before
    assert table.alpha[rows[1]] == pytest.approx(8 * 2.0 / 4)
    assert table.beta[rows[2]] == pytest.approx(8 * 3.5 / 4)
    assert table.z_last[rows[1]] == 0.0
    assert (await world.ledger())["estimate"].ended["scored"] == 9
    job = store.memory.jobs["0123456789ab"]
    assert job.finished_at_s is not None
    memory = await load_memory(Store(store.config, redis).streams, store.config)
    assert memory.jobs[job.job_id].summary() == job.summary()


async def test_failed_items_are_leased_again_at_most_three_times(redis: Redis, keys: Keys) -> None:
    store, world = await start(redis, keys, prompts=3)
    await store.set_training("paused")
    ids = [p.prompt_id for p in make_prompts(2)]
    await store.create_job(Job("0123456789ab", "evaluate", ids, 1, SAMPLING, 1.0))
    for attempt in range(4):
        assert await store.issue(100) == (2 if attempt == 0 else 1)
        for held in await world.take():
            if held.lease.prompt_id == ids[0]:
                await world.replica.fail(held, "attempts", "again")
            else:
                await world.replica.emit(held, make_trajectory(held.lease, 1.0))
        await settle(store)
        await wake(store)  # the count of failures survives a restart
    job = store.memory.jobs["0123456789ab"]
    assert (job.done, job.failed, job.finished_at_s is not None) == (1, 1, True)
    assert await store.issue(100) == 0
    counts = (await world.ledger())["evaluate"]
    assert (counts.leased, counts.ended["scored"], counts.ended["failed"]) == (5, 1, 4)
