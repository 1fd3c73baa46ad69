"""What no crash may change: every α and β equals a straight replay, and the ledger adds up."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
from collections import defaultdict
from pathlib import Path

import msgpack
import numpy as np
import pytest
from redis.asyncio import Redis

from services.value_store import loops
from services.value_store.evidence import HISTORY_FIELDS
from services.value_store.memory import OpenLease
from services.value_store.store import Store
from services.value_store.table import RECORD, new_record
from singlestream.clients.value_store import AsyncValueStore, NewPrompt
from singlestream.contracts import PosteriorUpdate, Trajectory, decode, encode
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from singlestream.streams.ledger import Change, ValueStoreStreams, prompt_id, read_ledger
from tests.contracts.messages import lease
from tests.services.value_store.conftest import StoreProcess
from tests.services.value_store.proxy import LossyProxy
from tests.services.value_store.world import Running, World, make_config, make_prompts, until

PROMPTS, ROUNDS = 2000, 10


async def posteriors(redis: Redis, keys: Keys) -> dict[str, tuple[float, float]]:
    """α and β of every prompt, from Redis alone."""
    found = {}
    for name, record in (await redis.hgetall(keys.values)).items():
        fields = np.frombuffer(record[: RECORD.itemsize], RECORD)[0]
        found[name.decode()] = (float(fields["alpha"]), float(fields["beta"]))
    return found


def replay(rewards: list[tuple[int, float]]) -> tuple[float, float]:
    """α and β by hand, from evidence (version, reward) in order, with z = version / 20 (docs/spo.md)."""
    alpha = beta = 0.5
    z_last: float | None = None
    for version, reward in rewards:
        z = version / 20
        gap = 0.0 if z_last is None else max(0.0, z - z_last)
        rho = min(0.96, max(0.875, 2**-gap))
        alpha, beta = rho * alpha + reward, rho * beta + 1 - reward
        z_last = z if z_last is None else max(z, z_last)
    return alpha, beta


async def check_replay(redis: Redis, keys: Keys, sent: dict[str, list[tuple[int, float]]]) -> None:
    found = await posteriors(redis, keys)
    for prompt, rewards in sent.items():
        assert found[prompt] == pytest.approx(replay(rewards), abs=1e-9)
    assert all(one.adds_up for one in (await read_ledger(redis, keys)).values())


async def seed(redis: Redis, keys: Keys) -> tuple[list[list[PosteriorUpdate]], dict[str, list[tuple[int, float]]]]:
    """Outstanding leases as an earlier store left them, and the rounds of updates that will end them."""
    rng, streams = random.Random(7), ValueStoreStreams(redis, keys)
    await streams.take_over()
    ids = [prompt_id("s", f"q{i}") for i in range(PROMPTS)]
    await streams.commit(Change(values={one: new_record(0.5, 0.5, "train", "s", 0.0) for one in ids}), 8)
    await redis.hset(keys.clock, mapping={str(v): repr(v / 20) for v in range(ROUNDS)})
    rounds, sent = [], defaultdict(list)
    for version in range(ROUNDS):
        rng.shuffle(ids)
        updates, leases = [], []
        for i, one in enumerate(ids):
            number = f"train:{streams.epoch}:{version * PROMPTS + i + 1}"
            reward = rng.choice([0.0, 1.0, rng.random()])
            leases.append((lease(lease_id=number, prompt_id=one), OpenLease(one, 0.5, version, 0.0).pack()))
            updates.append(
                PosteriorUpdate(lease_id=number, prompt_id=one, outcome="trained", reward=reward, version=version)
            )
            sent[one].append((version, reward))
        await streams.issue("train", leases)
        rounds.append(updates)
    return rounds, sent


async def send(redis: Redis, keys: Keys, updates: list[PosteriorUpdate]) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for update in updates:
            pipe.xadd(keys.posterior_updates, {"id": update.lease_id, "m": encode(update)})
        await pipe.execute()


async def trained(redis: Redis, keys: Keys) -> int:
    return (await read_ledger(redis, keys))["train"].ended["trained"]


@pytest.mark.timeout(300)
async def test_kill_9_five_times_in_20_000_updates_with_duplicates(
    redis: Redis, keys: Keys, store_process: StoreProcess
) -> None:
    rounds, sent = await seed(redis, keys)
    rng, kills = random.Random(8), 0
    for number, updates in enumerate(rounds):
        earlier = [update for one in rounds[:number] for update in one]
        repeated = rng.sample(earlier, min(len(earlier), 300)) + rng.sample(updates, 300)
        # A prompt's first update of a round decides; a repeated one may stand before or behind it, but is the same one.
        mixed = updates + repeated
        rng.shuffle(mixed)
        await send(redis, keys, mixed)
        if kills == 5:
            continue

        async def underway(at: int = number * PROMPTS + rng.randrange(1, 1000)) -> bool:
            return await trained(redis, keys) >= at

        store_process.start(ready=False)  # it finds the round there, and works on it until it is killed
        await until(underway, "the round to be under way", every_s=0.001)
        store_process.kill()
        kills += await trained(redis, keys) < (number + 1) * PROMPTS  # else it was faster, and the next round is tried
    assert kills == 5, "the store was killed in the middle of so many rounds"
    store_process.start()
    await until(lambda: counted(redis, keys), "every update and duplicate to be counted")
    await check_replay(redis, keys, sent)
    counts = (await read_ledger(redis, keys))["train"]
    assert (counts.leased, counts.outstanding, counts.ended["trained"]) == (20_000, 0, 20_000)


async def counted(redis: Redis, keys: Keys) -> bool:
    duplicates = sum(min(300, number * PROMPTS) + 300 for number in range(ROUNDS))
    return (await trained(redis, keys), int(await redis.hget(keys.ledger, "duplicates") or 0)) == (20_000, duplicates)


OFTEN = {"ISSUE", "COMMIT", "TAKE_OVER", "XREAD", "INFO", "HSCAN", "HMGET", "SCRIPT", "XGROUP", "HGETALL", "XREVRANGE"}
"""Kinds of command that the store sends many times (those in a pipeline go by its first), and all the others."""
ONCE = {"MGET", "MULTI", "TIDY", "XINFO", "XRANGE", "CANCEL", "END_TRAINING"}


@pytest.mark.parametrize("lose_nth", [1, 4])
@pytest.mark.timeout(300)
async def test_one_lost_reply_of_every_kind_of_command(
    redis: Redis, keys: Keys, redis_server: EmbeddedRedis, lose_nth: int
) -> None:
    proxy = LossyProxy(str(redis_server.socket), lose_nth)
    port = await proxy.start()
    client = connect(f"redis://127.0.0.1:{port}")
    world, sent = World(redis, keys), defaultdict(list)
    try:
        async with Running(Store(make_config(keys), client)) as store:
            proxy.armed = True

            async def insisting(call: object) -> None:
                async def done() -> bool:
                    try:
                        await call()  # type: ignore[operator]
                    except Exception as error:
                        assert type(error).__name__ == "NotReady", error
                        return False
                    return True

                await until(done, "a change to get through")

            ids = [prompt.prompt_id for prompt in make_prompts(40)]
            for _ in range(lose_nth + 1):
                await insisting(lambda: store.upsert(make_prompts(40), [None] * 40))
            await world.start()
            await world.publish(0, z=0.0)
            await insisting(lambda: store.set_training("running"))
            rng = random.Random(9)

            async def turn() -> bool:
                await world.report()
                await world.play(lambda _: rng.choice([0.0, 1.0]))
                for update in await world.train():
                    sent[update.prompt_id].append((update.version or 0, update.reward or 0.0))
                return sum(map(len, sent.values())) >= 150

            await until(turn, "150 updates", deadline_s=100)
            await insisting(lambda: loops.tidy(store))

            async def unread() -> bool:
                await world.report()
                return bool(await redis.xlen(keys.leases("train")))

            await until(unread, "leases that nobody takes")
            await insisting(lambda: store.set_training("stopped"))

            async def cancelled() -> bool:
                return (await world.ledger())["train"].ended["cancelled"] > 0

            await until(cancelled, "the early stop to cancel them")

            async def over() -> bool:
                await turn()
                counts = (await world.ledger())["train"]
                return (await redis.get(keys.state)) == b"stopped" and counts.outstanding == 0

            await until(over, "the early stop", deadline_s=60)
            await until(
                lambda: {kind for kind, count in proxy.seen.items() if count >= lose_nth} == set(proxy.lost),
                "the last loss",
            )
            await until(lambda: store.waiting_for is None, "the store")
            assert store.rebuilds > 3
    finally:
        await client.aclose()
        await proxy.stop()
    assert (OFTEN if lose_nth > 1 else OFTEN | ONCE) <= set(proxy.lost), proxy.lost
    assert set(sent) <= set(ids)
    await check_replay(redis, keys, sent)
    entries = [decode(fields[b"m"]) for _, fields in await redis.xrange(keys.trajectories)]
    assert sum(isinstance(one, Trajectory) for one in entries) == sum(map(len, sent.values()))


async def renewed(redis: Redis) -> bool:
    """Whether Redis has written its append-only file anew since it started."""
    about = await redis.info("persistence")
    return bool(about["aof_rewrites"]) and not about["aof_rewrite_in_progress"]


def append_only_file(folder: str) -> Path:
    [log] = (Path(folder) / "appendonlydir").glob("*.incr.aof")
    return log


@pytest.mark.timeout(300)
async def test_half_a_transaction_at_the_end_of_the_file_is_never_applied(keys: Keys) -> None:
    """Not at the next start of Redis, which cuts it, nor at the one after: Redis 7 leaves the MULTI in its file."""
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        server = EmbeddedRedis(Path(folder), fsync="no")
        server.start()
        outside, inside = connect(server.url), connect(server.url)
        try:
            async with Running(Store(make_config(keys), inside)) as store:
                world = World(outside, keys)
                await store.upsert(make_prompts(40), [None] * 40)
                await world.start()
                await world.publish(0)
                await store.set_training("running")

                async def leased() -> bool:
                    await world.report()
                    return (await world.ledger())["train"].leased >= 8

                await until(leased, "leases")
                await until(lambda: renewed(outside), "a new file")
                rebuilds = store.rebuilds
                server.kill()
                log = append_only_file(folder)
                written = log.read_bytes()
                counting = written.rindex(b"train:leased")  # the last command of the script that issues leases
                assert b"EXEC" in written[counting:]
                log.write_bytes(written[:counting])
                server.start()
                await until(lambda: store.rebuilds > rebuilds, "the store to read again")
                await until(leased, "leases in place of those lost")
                await until(lambda: renewed(outside), "a new file")
                rebuilds = store.rebuilds
                server.kill()
                server.start()
                await until(lambda: store.rebuilds > rebuilds, "the store to read again")
                assert (await world.ledger())["train"].outstanding == 8
        finally:
            await outside.aclose()
            await inside.aclose()
            server.stop()


@pytest.mark.timeout(300)
async def test_redis_killed_and_its_file_cut_while_the_services_run(keys: Keys) -> None:
    """Leases, trajectories and updates of the last moment are gone; what is left goes on and adds up."""
    rng = random.Random(10)
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        server = EmbeddedRedis(Path(folder), fsync="no")
        server.start()
        outside, inside = connect(server.url), connect(server.url)
        try:
            async with Running(Store(make_config(keys), inside)) as store:
                world = World(outside, keys)
                await store.upsert(make_prompts(40), [None] * 40)
                await world.start()
                await world.publish(0, z=0.0)
                await store.set_training("running")

                async def turn() -> int:
                    await world.report()
                    await world.replica.claim_dead(0.0, max_attempts=100)
                    await world.play(lambda _: rng.choice([0.0, 1.0]))
                    await world.train()
                    return (await read_ledger(outside, keys))["train"].ended["trained"]

                for cut in range(3):

                    async def enough(cut: int = cut) -> bool:
                        return await turn() >= 40 * (cut + 1)

                    await until(enough, "more updates", deadline_s=60)
                    await until(lambda: renewed(outside), "a new file")
                    rebuilds = store.rebuilds  # before the restart: the store may read again as soon as it can
                    server.kill()
                    log = append_only_file(folder)
                    size = log.stat().st_size
                    with log.open("r+b") as file:
                        file.truncate(size - rng.randrange(2000, 12_000))
                    await asyncio.sleep(0.3)
                    server.start()
                    await until(lambda then=rebuilds: store.rebuilds > then, "the store to read again")
                    world.cursor = "0-0"  # the learner's checkpoint: it sends its updates again
                await store.set_training("stopped")

                async def over() -> bool:
                    await turn()
                    counts = (await world.ledger())["train"]
                    return (await outside.get(keys.state)) == b"stopped" and counts.outstanding == 0

                await until(over, "the early stop", deadline_s=60)
                sent: dict[str, list[tuple[int, float]]] = {}
                for prompt in make_prompts(40):
                    records = await outside.lrange(keys.history(prompt.prompt_id), 0, -1)
                    rows = [dict(zip(HISTORY_FIELDS, msgpack.unpackb(one), strict=True)) for one in reversed(records)]
                    assert len({row["lease_id"] for row in rows}) == len(rows)
                    sent[prompt.prompt_id] = [(row["version"], row["reward"]) for row in rows]
                await check_replay(outside, keys, sent)
                counts = (await read_ledger(outside, keys))["train"]
                assert sum(map(len, sent.values())) == counts.ended["trained"] >= 100
        finally:
            await outside.aclose()
            await inside.aclose()
            server.stop()


@pytest.mark.timeout(300)
async def test_a_stopped_store_that_was_replaced_changes_nothing(
    redis: Redis, keys: Keys, store_process: StoreProcess, tmp_path: Path, redis_server: EmbeddedRedis
) -> None:
    world, sent = World(redis, keys), defaultdict(list)
    store_process.start()
    second = StoreProcess(tmp_path, keys, redis_server.url)
    try:
        async with AsyncValueStore(store_process.url) as first:
            await first.upsert([NewPrompt(question=f"q{i}", answer=str(i), source="s") for i in range(20)])
            await first.set_training("running")
        await world.start()
        await world.publish(0, z=0.0)

        async def turn(at: int) -> bool:
            await world.report()
            await world.play(lambda one: float(int(one.answer) % 2))
            for update in await world.train():
                sent[update.prompt_id].append((update.version or 0, update.reward or 0.0))
            return sum(map(len, sent.values())) >= at

        await until(lambda: turn(40), "40 updates")
        store_process.send(signal.SIGSTOP)
        second.start()
        await until(lambda: turn(80), "40 updates more")
        store_process.send(signal.SIGCONT)
        assert store_process.process is not None
        for at in range(90, 200, 10):
            await until(lambda at=at: turn(at), "updates beside the zombie")
        assert await asyncio.to_thread(store_process.process.wait, 60) == 3
        assert "another value store has taken over" in store_process.log.read_text()
        async with AsyncValueStore(second.url) as heir:
            await heir.set_training("paused")

        async def over() -> bool:
            await turn(0)
            return (await world.ledger())["train"].outstanding == 0

        await until(over, "the rest")
        await check_replay(redis, keys, sent)
    finally:
        second.stop()
