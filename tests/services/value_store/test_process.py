"""The store as a process: kill -9 between updates, SIGTERM, and what it refuses at its start."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from redis.asyncio import Redis

from services.value_store import posterior
from singlestream.clients.value_store import AsyncValueStore, NewPrompt
from singlestream.streams import Keys
from tests.services.value_store.conftest import StoreProcess
from tests.services.value_store.world import World, until


async def test_kill_9_between_updates(redis: Redis, keys: Keys, store_process: StoreProcess) -> None:
    world = World(redis, keys)
    store_process.start()
    evidence: dict[str, list[tuple[int, float]]] = {}
    async with AsyncValueStore(store_process.url) as store:
        prompts = [NewPrompt(question=f"q{i}", answer=str(i), source="s") for i in range(40)]
        ids = await store.upsert(prompts)
        await store.set_training("running")
        await world.start()
        await world.publish(0)
        for kill in range(5):
            target = (kill + 1) * 30

            async def turn(target: int = target) -> bool:
                await world.report()
                await world.play(lambda lease: float(int(lease.answer) % 2))
                for update in await world.train():
                    assert update.reward is not None
                    evidence.setdefault(update.prompt_id, []).append((update.version or 0, update.reward))
                    await world.learner.send_updates([update])  # everything twice
                return sum(map(len, evidence.values())) >= target

            await until(turn, f"{target} updates")
            store_process.kill()
            store_process.start()

        async def settled() -> bool:
            counts = (await world.ledger())["train"]
            return counts.ended["trained"] >= sum(map(len, evidence.values()))

        await until(settled, "the rest to be applied")
        await store.set_training("paused")
        for prompt in ids:
            alpha, beta = 0.5, 0.5
            for _, reward in evidence.get(prompt, []):
                new = posterior.update(alpha, beta, 0.96, reward)
                alpha, beta = float(new[0]), float(new[1])
            got = await store.get(prompt)
            assert abs(got.alpha - alpha) < 1e-9
            assert abs(got.beta - beta) < 1e-9
            assert got.visits == len(evidence.get(prompt, []))


async def test_sigterm_ends_it_cleanly(store_process: StoreProcess) -> None:
    store_process.start()
    assert store_process.stop() == 0


async def test_a_replaced_store_exits_and_says_why(
    redis: Redis, keys: Keys, store_process: StoreProcess, tmp_path: Path, redis_server: object
) -> None:
    store_process.start()
    second = StoreProcess(tmp_path, keys, redis_server.url)  # type: ignore[attr-defined]
    second.start()
    try:
        assert store_process.process is not None
        assert await asyncio.to_thread(store_process.process.wait, 60) == 3  # though nobody asks it for anything
        assert "another value store has taken over" in store_process.log.read_text()
        second.wait_ready()
    finally:
        second.stop()


def test_off_loopback_it_needs_tokens(tmp_path: Path, keys: Keys) -> None:
    one = StoreProcess(tmp_path, keys, "unix:///none", host="0.0.0.0")  # noqa: S104
    one.start(ready=False)
    assert one.process is not None
    assert one.process.wait(30) == 2
    assert "read_token and value_store.write_token must be set" in one.log.read_text()


def test_help_is_quick_and_bad_settings_are_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.value_store"]
    reply = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--config" in reply.stdout
    reply = subprocess.run([*command, "--config", str(tmp_path / "none.toml")], capture_output=True, text=True)
    assert reply.returncode == 2
    assert "none.toml" in reply.stderr
