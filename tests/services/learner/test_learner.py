from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from redis import Redis

from services.learner.background import Background
from services.learner.learner import Learner
from services.learner.redis_link import RedisLink, Status
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import CheckpointError
from singlestream.streams import Keys

PARTS = ("checkpoints", "_beside", "_publisher", "_log", "_observers", "_server", "link")


class Part:
    def __init__(self, name: str, closed: list[str]) -> None:
        self.name, self.closed = name, closed

    def close(self) -> None:
        self.closed.append(self.name)
        if self.name in ("checkpoints", "_log"):
            raise OSError(f"{self.name}: the disk is full")


def test_every_part_is_closed_whichever_fails() -> None:
    learner, closed = object.__new__(Learner), list[str]()
    for name in PARTS:
        setattr(learner, name, Part(name, closed))
    with pytest.raises(ExceptionGroup) as caught:
        learner.close()
    assert closed == list(PARTS), "what writes first, the connection last"
    assert [str(error).partition(":")[0] for error in caught.value.exceptions] == ["checkpoints", "_log"]


def test_a_redis_that_has_lost_the_run_is_refused_at_every_start_and_left_as_it_is(
    sync_redis: Redis, redis_server: EmbeddedRedis, keys: Keys
) -> None:
    """Were the lineage counted before the refusal, the next start would be let in."""

    def refuse() -> None:
        raise CheckpointError("there are checkpoints")

    learner, done = object.__new__(Learner), list[str]()
    learner.link = RedisLink(redis_server.url, keys, Status(total_steps=4), 20.0)
    learner.ranks = SimpleNamespace(from_first=lambda ask: ask())  # type: ignore[assignment]
    learner.checkpoints = SimpleNamespace(  # type: ignore[assignment]
        refuse_unknown=refuse, remove_partials=lambda: done.append(f"fence {sync_redis.get(keys.fence('learner'))!r}")
    )
    for _ in range(2):
        with pytest.raises(CheckpointError):
            learner._take_over()
    assert not sync_redis.exists(keys.lineage, keys.fence("learner"))
    sync_redis.set(keys.lineage, 1)
    lineage, token = learner._take_over()
    assert (lineage, done) == (2, [f"fence {token.encode()!r}"]), "what others left goes when the fence is held"
    learner.link.close()


def test_the_resume_pointer_moves_behind_what_is_left_to_announce_close_and_log() -> None:
    """A resume does none of it again for the steps before its checkpoint."""
    learner, done, go = object.__new__(Learner), list[str](), threading.Event()
    learner._beside = Background("test")
    learner._beside.submit(lambda: done.append("announced and closed" if go.wait(20) else "never"))
    learner._log = SimpleNamespace(sync=lambda: done.append("logged"))  # type: ignore[assignment]
    learner.link = SimpleNamespace(streams=None, call=lambda _, what: done.append(what))  # type: ignore[assignment]
    threading.Timer(0.2, go.set).start()
    learner._point("step-00000001-aa", "0-0")
    assert done == ["announced and closed", "logged", "the resume pointer"]
    learner._beside.close()
