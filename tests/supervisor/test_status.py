from __future__ import annotations

import json
from pathlib import Path

from redis.asyncio import Redis

from singlestream.streams import Keys, LeaseConsumer
from singlestream.supervisor.status import Queues, eta_s, read_queues, read_steps, render
from tests.streams.test_leases import issue


def step(number: int, wall_s: float) -> dict[str, object]:
    return {
        "step": number,
        "wall_s": wall_s,
        "reward_mean": 0.5,
        "tool_calls_mean": 1.0,
        "staleness_mean": 0.25,
        "staleness_max": 2,
        "tokens_per_s": 1234.5,
        "learner_idle_ratio": 0.4,
    }


def test_a_line_half_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps(step(1, 2.0)) + "\n" + json.dumps(step(2, 4.0))[:20])
    assert [one["step"] for one in read_steps(path)] == [1]
    assert read_steps(tmp_path / "none.jsonl") == []


def test_eta_follows_the_pace() -> None:
    assert eta_s([step(1, 2.0), step(3, 6.0)], total_steps=10) == 14.0
    assert eta_s([step(1, 2.0)], total_steps=10) is None


async def test_queues_and_line(redis: Redis, keys: Keys) -> None:
    for n in (1, 2, 3):
        await issue(redis, keys, f"train:5f3a9c01:{n}")
    consumer = LeaseConsumer(redis, keys, "a")
    await consumer.join()
    await consumer.take(["train"], 1, block_ms=1000)
    queues = await read_queues(redis, keys)
    assert queues == Queues(unread=2, running=1, outstanding=0, dead_letters=0)
    line = render([step(1, 2.0), step(3, 6.0)], queues, total_steps=10)
    assert "step 3/10 | reward 0.500" in line
    assert "learner idle 40% | ETA 14 s" in line
    assert "2 unread 1 running" in line
    steps = [step(1, 2.0), step(3, 6.0)]
    assert "ETA 14 s" in render(steps, queues, total_steps=10, since_s=59.0)
    assert "no step for 61 s" in render(steps, queues, total_steps=10, since_s=61.0)
    assert "no step" not in render(steps, queues, total_steps=3, since_s=61.0), "all are done"
    slow = [step(1, 2.0), step(3, 62.0)]
    assert "no step" not in render(slow, queues, total_steps=10, since_s=61.0), "its usual pace"
    assert "Redis does not answer" in render([], None, total_steps=10)
