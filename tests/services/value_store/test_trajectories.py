"""The last trajectories of a prompt: bounded, told with their texts where the tokenizer is there."""

from __future__ import annotations

import asyncio
from pathlib import Path

from redis.asyncio import Redis
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from services.value_store import loops
from services.value_store.store import Store
from services.value_store.trajectories import LastTrajectories
from singlestream.contracts import Tombstone, encode
from singlestream.streams import Keys
from tests.contracts.messages import trajectory
from tests.services.value_store.test_rest import bodies, client_of, put, trained
from tests.services.value_store.world import make_config, until, wake


def test_the_oldest_is_given_up_and_nothing_is_kept_twice() -> None:
    data = [encode(trajectory(lease_id=f"train:5f3a9c01:{n}", prompt_id=f"p{n % 2}")) for n in range(1, 8)]
    kept = LastTrajectories(max_bytes=4 * len(data[0]) + 3)
    lost = Tombstone(lease_id="train:5f3a9c01:8", prompt_id="p1", reason="attempts", detail="", attempts=3)
    for one in [*data, data[-1], encode(lost), b"rubbish"]:
        kept.add(one)
    assert [one.lease_id for one in kept.of("p1", 9)] == ["train:5f3a9c01:7", "train:5f3a9c01:5"]
    assert [one.lease_id for one in kept.of("p0", 1)] == ["train:5f3a9c01:6"]
    assert kept.held_bytes == sum(map(len, data[3:]))
    kept.add(encode(trajectory(lease_id="train:5f3a9c01:9", prompt_id="p" * 5000)))
    assert kept.of("p0", 9) == kept.of("p1", 9) == []
    assert len(kept.of("p" * 5000, 9)) == 1


async def test_a_prompt_tells_its_last_trajectories(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    Tokenizer(WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    store = Store(make_config(keys, model=tmp_path), redis)
    await wake(store)
    async with client_of(store) as http:
        await put(http, bodies(4))
        await trained(store, redis, keys, 4)
        store._ready.set()
        following = asyncio.create_task(loops.follow_trajectories(store))
        try:
            row = int(store.memory.table.visits.argmax())
            place = f"/v1/prompts/{store.memory.table.id(row)}/trajectories"

            async def told() -> bool:
                return len((await http.get(place)).json()["trajectories"]) == 1

            await until(told, "the trajectory")
        finally:
            following.cancel()
            await asyncio.wait([following])
        [one] = (await http.get(place)).json()["trajectories"]
        assert [(part["kind"], part["text"], part["version"], part["tokens"]) for part in one["segments"]] == [
            ("prompt", "w1", None, 1),
            ("generated", "w8 w9", 0, 2),
            ("observation", "w3 w4", None, 2),
        ]
        assert one["reward"] in (0.0, 1.0)
        assert (one["end_reason"], one["turns"], one["version"], one["tool_calls"]) == ("stop", 1, 0, [])
        assert (await http.get("/v1/prompts/0123456789abcdef/trajectories")).status_code == 404
