"""What rank 0 waits for in Redis, and what it can do without."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from redis import Redis

from services.learner import intake
from services.learner.batches import BatchAssembler, Position
from services.learner.intake import StreamReader
from services.learner.redis_link import RedisLink, Status
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import CheckpointError, DeadlineExceeded
from singlestream.streams import Keys
from tests.services.learner.recorded import record

HOUR_S = 3600.0


@pytest.fixture
def link(redis_server: EmbeddedRedis, keys: Keys) -> Iterator[RedisLink]:
    one = RedisLink(redis_server.url, keys, Status(total_steps=4), 20.0)
    one.call(one.streams.take_over, "the fence")
    yield one
    one.close()


def test_the_seconds_of_a_long_step_are_no_silence(
    sync_redis: Redis, keys: Keys, link: RedisLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``max_staleness = 0`` nothing can arrive while a step computes."""
    later_s = 0.0
    monkeypatch.setattr(intake, "POLL_MS", 1)
    monkeypatch.setattr(intake, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later_s))
    record(sync_redis, keys, 64, last=8)
    reader = StreamReader(link, BatchAssembler(8, 4, Position()), 128, 512, HOUR_S, HOUR_S)
    assert reader.poll(0)
    later_s += 2 * HOUR_S
    reader.commit()
    assert not reader.poll(1), "the wait has only begun"
    later_s += 2 * HOUR_S
    with pytest.raises(DeadlineExceeded, match="trajectories: 0 of 8 have arrived"):
        reader.poll(1)


def test_a_pause_is_no_silence(sync_redis: Redis, keys: Keys, link: RedisLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """Priors of a large set take half a day, in which nothing is trained."""
    later_s = 0.0
    monkeypatch.setattr(intake, "POLL_MS", 1)
    monkeypatch.setattr(intake, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later_s))
    sync_redis.set(keys.state, "paused")
    reader = StreamReader(link, BatchAssembler(8, 4, Position()), 128, 512, HOUR_S, HOUR_S)
    for _ in range(3):
        later_s += 2 * HOUR_S
        assert not reader.poll(0)
    sync_redis.set(keys.state, "running")
    assert not reader.poll(0), "the wait begins when training goes on"
    later_s += 2 * HOUR_S
    with pytest.raises(DeadlineExceeded):
        reader.poll(0)


def test_a_checkpoint_whose_future_has_been_trimmed_is_refused(sync_redis: Redis, keys: Keys, link: RedisLink) -> None:
    """One that was put back from an archive would train what is left of the run, and wait for the rest in vain."""
    record(sync_redis, keys, 64, last=8)
    entries = [entry.decode() for entry, _ in sync_redis.xrange(keys.trajectories)]  # type: ignore[union-attr]
    link.call(lambda: link.streams.resume_from("step-00000001-aa", entries[4]), "the resume pointer")

    def reader(cursor: str) -> StreamReader:
        return StreamReader(link, BatchAssembler(8, 4, Position(cursor)), 128, 512, HOUR_S, HOUR_S)

    assert not reader(entries[4]).poll(0), "three have arrived behind it"
    with pytest.raises(CheckpointError, match=f"begins at {entries[4]}: what it would train next has been trimmed"):
        reader(entries[3])
    sync_redis.delete(keys.trajectories)
    with pytest.raises(CheckpointError, match="is empty"):
        reader(entries[4])


def test_the_end_of_a_run_does_without_a_last_heartbeat(caplog: pytest.LogCaptureFixture) -> None:
    away = RedisLink("redis://127.0.0.1:1", Keys("away"), Status(total_steps=4), 0.1)
    with caplog.at_level(logging.WARNING):
        away.beat_now()
    away.close()
    assert "last heartbeat not sent" in caplog.text
