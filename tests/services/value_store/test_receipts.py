"""Who is alive is told by this machine's clock, whatever the others' say."""

from __future__ import annotations

import json

import pytest
from redis.asyncio import Redis

from services.value_store import loops
from services.value_store.receipts import Receipts
from services.value_store.store import Store
from singlestream.streams import Keys
from tests.services.value_store.world import make_config, wake

SKEWS_S = [-86_400.0, -3600.0, -11.0, 0.0, 11.0, 3600.0]


@pytest.mark.parametrize("skew_s", SKEWS_S)
def test_a_sender_is_heard_when_its_word_changes(skew_s: float) -> None:
    receipts = Receipts()
    receipts.note({}, 99.0)
    for now_s in (100.0, 102.0, 104.0):
        assert receipts.note({"a": now_s + skew_s - 0.3}, now_s) == {"a": now_s}
    assert receipts.note({"a": 103.7 + skew_s}, 120.0) == {"a": 104.0}, "it has not changed since"
    assert receipts.note({}, 121.0) == {}


def test_what_stands_at_the_first_look_is_as_old_as_it_says() -> None:
    assert Receipts().note({"old": 10.0, "ahead": 500.0}, 100.0) == {"old": 10.0, "ahead": 100.0}


@pytest.mark.parametrize("skew_s", SKEWS_S)
async def test_a_skewed_clock_makes_nobody_dead(
    redis: Redis, keys: Keys, skew_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replica and learner on a machine whose clock is wrong, found at the store's start: alive from their next word."""
    store = Store(make_config(keys), redis)
    await wake(store)
    now_s = 1_000_000.0
    monkeypatch.setattr("time.time", lambda: now_s)
    for word in range(3):
        replica = {"slots": 4, "in_use": 0, "version": 0, "lineage": 1, "at_s": now_s + skew_s}
        await redis.hset(keys.replicas, "r1", json.dumps(replica))
        await redis.set(keys.learner, json.dumps({"step": 1, "state": "waiting", "at_s": now_s + skew_s}))
        for _ in range(2):
            await loops._wanted(store)
            await loops.check_redis(store)
        if word:
            assert [one.name for one in store.alive_replicas()] == ["r1"]
            assert store.recent.learner is not None
            assert store.recent.learner["at_s"] == now_s
        now_s += 2.0
    now_s += 10.0
    await loops._wanted(store)
    assert store.alive_replicas() == []
