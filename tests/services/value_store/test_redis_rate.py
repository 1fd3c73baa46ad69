"""What `benchmarks.value_store` measures the store against is what the store has Redis do: no less and no more."""

from __future__ import annotations

from redis.asyncio import Redis

from benchmarks.redis_rate import seconds_of, together, update_commands
from benchmarks.value_store import fill, make_config, seed_updates
from services.value_store.store import ENTRIES_PER_SCRIPT, Store
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys
from tests.services.value_store.world import settle, wake

UPDATES = ENTRIES_PER_SCRIPT + 32  # two batches


async def calls(redis: Redis) -> dict[str, int]:
    """Calls of each command, those within scripts too; but for what brings a script or a transaction about."""
    about = await redis.info("commandstats")
    await redis.config_resetstat()
    apart = {"evalsha", "multi", "exec", "echo", "info", "config|resetstat", "xread", "hello", "client|setinfo"}
    return {name: one["calls"] for key, one in about.items() if (name := key.removeprefix("cmdstat_")) not in apart}


async def test_the_commands_sent_raw_are_those_of_the_stores_scripts(
    redis: Redis, keys: Keys, redis_server: EmbeddedRedis
) -> None:
    ids = await fill(redis, keys, UPDATES, texts=False)
    await seed_updates(redis, keys, ids)
    store = Store(make_config(keys.run, redis_server.url), redis)
    await wake(store)
    await redis.config_resetstat()
    await settle(store)
    by_the_store = await calls(redis)
    for transactions in (False, True):
        alone = Keys(f"{keys.run}-alone-{transactions}")
        await seed_updates(redis, alone, ids)
        requests = await update_commands(redis, alone, ids, keys, ENTRIES_PER_SCRIPT, store.config.anchor_share)
        await redis.config_resetstat()
        await seconds_of(redis_server.socket, [together(one) for one in requests] if transactions else requests)
        assert await calls(redis) == by_the_store
        assert await redis.hgetall(alone.outstanding("train")) == {}
        assert await redis.xlen(alone.posterior_updates) == await redis.xlen(keys.posterior_updates) == 1
        for one in ids[:: UPDATES // 4]:
            sizes = [await redis.hstrlen(run.values, one) for run in (keys, alone)]
            records = [await redis.lrange(run.history(one), 0, -1) for run in (keys, alone)]
            assert sizes[0] == sizes[1]
            assert [len(record) for record in records[0]] == [len(record) for record in records[1]]
