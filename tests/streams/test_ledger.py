"""The value store's scripts on a real Redis: all or nothing, behind the fence, never on top of a surprise."""

from __future__ import annotations

import msgpack
import pytest
from redis.asyncio import Redis

from singlestream.contracts import Purpose, Tombstone, decode
from singlestream.contracts.trajectory import EndOfRun
from singlestream.errors import Fenced, UnknownOutcome
from singlestream.streams import GROUP, LOST, Keys, connect
from singlestream.streams.ledger import Change, ValueStoreStreams, prompt_id, read_ledger
from tests.contracts.messages import lease


async def owner(redis: Redis, keys: Keys) -> ValueStoreStreams:
    streams = ValueStoreStreams(redis, keys)
    await streams.take_over()
    return streams


async def issue(streams: ValueStoreStreams, count: int, purpose: Purpose = "train") -> list[str]:
    numbers = [f"{purpose}:{streams.epoch}:{n}" for n in range(1, count + 1)]
    await streams.issue(purpose, [(lease(lease_id=number), b"record") for number in numbers])
    return numbers


async def dump(redis: Redis, keys: Keys) -> dict[str, object]:
    """Everything of the run."""
    found: dict[str, object] = {}
    async for key in redis.scan_iter(f"ss:{keys.run}:*"):
        found[key.decode()] = await redis.dump(key)
    return found


def test_prompt_ids_are_stable() -> None:
    assert prompt_id("multiply", "47*91=?") == "fd050b7395755f9d"
    assert prompt_id("a", "bc") != prompt_id("ab", "c")


async def test_issue_writes_lease_live_outstanding_and_ledger_together(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    numbers = await issue(streams, 600)
    assert len(streams.epoch) == 8
    entries = await redis.xrange(keys.leases("train"))
    live = await redis.hgetall(keys.live)
    assert {fields[b"id"]: entry for entry, fields in entries} == live
    assert sorted(number.decode() for number in live) == sorted(numbers)
    assert await redis.hlen(keys.outstanding("train")) == 600
    counts = (await read_ledger(redis, keys))["train"]
    assert (counts.leased, counts.outstanding, counts.adds_up) == (600, 600, True)


async def test_commit_applies_the_whole_change(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    [a, b, c] = await issue(streams, 3)
    entry = (await redis.xadd(keys.posterior_updates, {"id": a, "m": b"x"})).decode()
    later = (await redis.xadd(keys.posterior_updates, {"id": b, "m": b"y"})).decode()
    change = Change(
        stream=keys.posterior_updates,
        after=entry,
        closes={("train", "trained"): [a], ("train", "failed"): [b]},
        values={"p": b"\x00\xff value"},
        prompts={"p": b"text"},
        history=[("p", bytes([i])) for i in range(5)],
        jobs={"j": b"job"},
        job_results={"j": {"0": b"result"}},
        dead_letters=[("source", c, "reason", b"\xff")],
        duplicates=2,
        state="running",
        calibration=b"\x01",
    )
    await streams.commit(change, history_entries=3)
    counts = (await read_ledger(redis, keys))["train"]
    assert (counts.leased, counts.outstanding, counts.ended["trained"], counts.ended["failed"]) == (3, 1, 1, 1)
    assert counts.adds_up
    assert await redis.hget(keys.values, "p") == b"\x00\xff value"
    assert await redis.hget(keys.prompts, "p") == b"text"
    assert await redis.lrange(keys.history("p"), 0, -1) == [b"\x04", b"\x03", b"\x02"]
    assert await redis.hget(keys.jobs, "j") == b"job"
    assert await redis.hget(keys.job_results("j"), "0") == b"result"
    assert await redis.hget(keys.ledger, "duplicates") == b"2"
    assert await redis.get(keys.state) == b"running"
    assert await redis.get(keys.calibration) == b"\x01"
    assert await redis.hget(keys.cursors, keys.posterior_updates) == entry.encode()
    assert [one.decode() for one, _ in await redis.xrange(keys.posterior_updates)] == [entry, later]
    [(_, letter)] = await redis.xrange(keys.dead_letters)
    assert letter == {b"source": b"source", b"id": c.encode(), b"reason": b"reason", b"m": b"\xff"}


async def test_a_change_from_a_wrong_memory_does_not_happen(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    [a, b] = await issue(streams, 2)
    await streams.commit(Change(closes={("train", "trained"): [a]}), 8)
    before = await dump(redis, keys)
    with pytest.raises(UnknownOutcome, match="outstanding:train in Redis differs"):
        await streams.commit(Change(closes={("train", "trained"): [b, a]}, values={"p": b"v"}), 8)
    with pytest.raises(UnknownOutcome, match="the cursor of"):
        stale = Change(stream=keys.posterior_updates, before="5-5", after="6-6", values={"p": b"v"})
        await streams.commit(stale, 8)
    assert await dump(redis, keys) == before


async def test_a_large_change_fits_one_script(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    numbers = await issue(streams, 9000)
    values = {f"{i:016x}": bytes(41) for i in range(9000)}
    await streams.commit(Change(closes={("train", "trained"): numbers}, values=values), 8)
    assert await redis.hlen(keys.values) == 9000
    assert (await read_ledger(redis, keys))["train"].outstanding == 0


async def test_a_fenced_store_writes_nothing(redis: Redis, keys: Keys) -> None:
    old = await owner(redis, keys)
    [a] = await issue(old, 1)
    unread = await old.unread("train")
    new = await owner(redis, keys)
    assert new.epoch != old.epoch
    before = await dump(redis, keys)
    stone = Tombstone(lease_id=a, prompt_id="p", reason="cancelled", detail="", attempts=0)
    for write in (
        lambda: issue(old, 1),
        lambda: old.commit(Change(closes={("train", "trained"): [a]}), 8),
        lambda: old.cancel("train", [(*unread[0], stone)]),
        lambda: old.end_training("x", "stopping", "stopped"),
        lambda: old.tidy(0, 0.0),
        old.take_over,
    ):
        with pytest.raises(Fenced):
            await write()
    assert await dump(redis, keys) == before


async def test_a_store_may_replace_its_own_epoch_and_a_lost_fence(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    first = streams.epoch
    assert await streams.take_over() != first
    await redis.set(keys.fence("value_store"), first)  # as after a lost tail of the append-only file
    await streams.take_over()
    await redis.delete(keys.fence("value_store"))
    await streams.take_over()
    assert (await redis.get(keys.fence("value_store"))).decode() == streams.epoch


async def test_a_store_that_starts_before_redis_does_takes_over_all_the_same(redis: Redis, keys: Keys) -> None:
    """After a reboot of the machine, say: the fence is its predecessor's, and its own first calls fail."""
    await owner(redis, keys)
    away = connect("unix:///nowhere/redis.sock")
    streams = ValueStoreStreams(away, keys)
    for _ in range(2):
        with pytest.raises(LOST):
            await streams.take_over()
    streams.redis = redis
    await streams.take_over()
    await issue(streams, 1)
    await away.aclose()


async def test_a_restart_of_redis_is_an_unknown_outcome(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    await redis.script_flush()
    with pytest.raises(UnknownOutcome, match="restarted"):
        await issue(streams, 1)
    await streams.take_over()
    await issue(streams, 1)


async def test_cancel_takes_only_what_nobody_has_read(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    numbers = await issue(streams, 4)
    unread = await streams.unread("train")
    assert [number for number, _ in unread] == numbers
    await redis.xreadgroup(GROUP, "r", {keys.leases("train"): ">"}, count=2)
    stones = [Tombstone(lease_id=n, prompt_id="p", reason="cancelled", detail="", attempts=0) for n in numbers]
    wanted = [(number, entry, stone) for (number, entry), stone in zip(unread, stones, strict=True)]
    assert await streams.cancel("train", wanted) == numbers[2:]
    assert await streams.cancel("train", wanted) == []
    assert [decode(fields[b"m"]) for _, fields in await redis.xrange(keys.trajectories)] == stones[2:]
    counts = (await read_ledger(redis, keys))["train"]
    assert (counts.outstanding, counts.ended["cancelled"], counts.adds_up) == (2, 2, True)
    assert await redis.hlen(keys.live) == 2
    assert await redis.xlen(keys.leases("train")) == 2


async def test_the_end_marker_waits_for_every_lease_and_stands_once(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    [a] = await issue(streams, 1)
    await redis.set(keys.state, "stopping")
    assert not await streams.end_training("stopped", "stopping", "stopped")
    await redis.hdel(keys.live, a)  # its trajectory is in the stream now
    assert await streams.end_training("stopped", "stopping", "stopped")
    assert not await streams.end_training("stopped", "stopping", "stopped")
    [(_, fields)] = await redis.xrange(keys.trajectories)
    assert decode(fields[b"m"]) == EndOfRun(reason="stopped")
    assert await redis.get(keys.state) == b"stopped"


async def test_scan_reads_everything(redis: Redis, keys: Keys) -> None:
    streams = await owner(redis, keys)
    await redis.hset(keys.values, mapping={f"{i}": msgpack.packb(i) for i in range(25_000)})
    found = {}
    async for batch in streams.scan(keys.values):
        found.update(batch)
    assert len(found) == 25_000
