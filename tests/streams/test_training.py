from __future__ import annotations

import pytest
from redis.asyncio import Redis

from singlestream.contracts import PolicyVersion, PosteriorUpdate, decode_as, encode
from singlestream.errors import DeadlineExceeded, Fenced
from singlestream.streams import Keys, LearnerStreams, connect, newest_version, persist, training
from tests.contracts.messages import EXAMPLES


def version(**changes: object) -> PolicyVersion:
    return EXAMPLES["policy_version"].model_copy(update=changes)  # type: ignore[return-value]


async def test_the_first_publication_writes_the_clock(redis: Redis, keys: Keys) -> None:
    learner = LearnerStreams(redis, keys)
    assert await learner.take_over() == 1
    await learner.publish(version(version=1, z=0.5))
    await learner.publish(version(version=1, z=0.9, lineage=2))
    assert await redis.hget(keys.clock, "1") == b"0.5"
    newest = await newest_version(redis, keys)
    assert newest is not None
    assert (newest.version, newest.lineage) == (1, 2)


async def test_what_a_start_asks_before_it_takes_over(redis: Redis, keys: Keys) -> None:
    learner = LearnerStreams(redis, keys)
    assert not await learner.is_known() and await learner.drift_clock() == {} and not await learner.is_paused()
    await learner.take_over()
    await learner.publish(version(version=1, z=0.1 + 0.2))
    await redis.set(keys.state, "paused")
    assert await learner.is_known() and await learner.drift_clock() == {1: 0.1 + 0.2} and await learner.is_paused()


async def test_old_versions_go_and_their_z_stays(redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VERSIONS_KEPT", 3)
    learner = LearnerStreams(redis, keys)
    await learner.take_over()
    for number in range(1, 6):
        await learner.publish(version(version=number, z=0.1 * number))
    kept = [decode_as(PolicyVersion, fields[b"m"]).version for _, fields in await redis.xrange(keys.policy_versions)]
    assert kept == [3, 4, 5]
    assert await redis.hlen(keys.clock) == 5


async def test_a_zombie_learner_writes_nothing(redis: Redis, keys: Keys) -> None:
    zombie, learner = LearnerStreams(redis, keys), LearnerStreams(redis, keys)
    assert await zombie.take_over() == 1
    assert await learner.take_over() == 2
    update = PosteriorUpdate(lease_id="train:5f3a9c01:1", prompt_id="a", outcome="trained", reward=1, version=0)
    for write in (
        lambda: zombie.publish(version()),
        lambda: zombie.send_updates([update]),
        lambda: zombie.resume_from("step-1", "0-0"),
        lambda: zombie.dead_letter("", b"", "x"),
        lambda: zombie.put_anchors([(update.lease_id, b"x")], 0),
        lambda: zombie.heartbeat("{}"),
    ):
        with pytest.raises(Fenced, match="taken over"):
            await write()
    written = (keys.policy_versions, keys.posterior_updates, keys.clock, keys.resume, keys.dead_letters)
    for key in (*written, keys.anchor_counts, keys.learner):
        assert not await redis.exists(key)


async def test_trimming_keeps_what_a_kept_checkpoint_needs(redis: Redis, keys: Keys) -> None:
    learner = LearnerStreams(redis, keys)
    await learner.take_over()
    entries = [
        (await redis.xadd(keys.trajectories, {"id": str(n), "m": encode(EXAMPLES["trajectory"])})).decode()
        for n in range(6)
    ]
    await learner.resume_from("step-2", oldest_needed=entries[2])
    left = await learner.read(entries[2], 10, block_ms=10)
    assert [entry for entry, _, _ in left] == entries[3:]
    assert await redis.get(keys.resume) == b"step-2"


async def test_more_updates_than_one_script_takes(redis: Redis, keys: Keys) -> None:
    learner = LearnerStreams(redis, keys)
    await learner.take_over()
    await learner.send_updates(
        [
            PosteriorUpdate(lease_id=f"train:5f3a9c01:{n}", prompt_id="a", outcome="trained", reward=1, version=0)
            for n in range(1, 3001)
        ]
    )
    assert await redis.xlen(keys.posterior_updates) == 3000


async def test_a_missing_redis_is_named_at_the_deadline(tmp_path: object) -> None:
    client = connect(f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(DeadlineExceeded, match="Redis, for a test"):
        await persist(lambda: client.ping(), "a test", deadline_s=0.2)
    await client.aclose()


async def test_a_full_redis_is_waited_for_like_one_that_is_away(redis: Redis, keys: Keys) -> None:
    """Its writers would otherwise end one after the other, and each start needs writes of its own."""
    learner, refused = LearnerStreams(redis, keys), []
    await learner.take_over()
    await redis.config_set("maxmemory", 1)

    async def publish() -> None:
        if len(refused) == 2:
            await redis.config_set("maxmemory", 0)
        await learner.publish(version())

    try:
        await persist(publish, "a version", 60, refused.append)
    finally:
        await redis.config_set("maxmemory", 0)
    assert ["OOM" in str(error) or "memory" in str(error) for error in refused] == [True, True]
    assert await redis.xlen(keys.policy_versions) == 1
