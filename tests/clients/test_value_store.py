"""Both clients against the real application over a real Redis."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from singlestream.clients.value_store import AsyncValueStore, NewPrompt, ValueStore
from singlestream.errors import ServiceError
from singlestream.streams import Keys
from tests.services.value_store.conftest import StoreProcess, store_process  # noqa: F401  a fixture
from tests.services.value_store.world import World, until


def prompts(count: int) -> list[NewPrompt]:
    return [NewPrompt(question=f"q{i}", answer=str(i), source="s") for i in range(count)]


async def test_both_clients_tell_the_same(redis: Redis, keys: Keys, store_process: StoreProcess) -> None:  # noqa: F811
    store_process.start()
    world = World(redis, keys)
    await world.start()
    await world.publish(0)
    async with AsyncValueStore(store_process.url) as store:
        ids = await store.upsert(prompts(10))
        job = await store.create_job("evaluate", prompt_ids=ids[:2], n=2)
        assert (await store.set_training("running")).state == "running"

        async def finished() -> bool:
            await world.report()
            await world.play()
            await world.train()
            return (await store.job(job.job_id)).state == "finished" and (await store.training()).trained >= 20

        await until(finished, "a job and 20 trainings")
        await store.set_training("paused")

        async def quiet() -> bool:
            await world.play()
            await world.train()
            return (await store.ledger()).train.outstanding == 0

        await until(quiet, "the rest")
        assert await store.ready()

        def blocking() -> list[object]:
            with ValueStore(store_process.url) as sync:
                assert sync.upsert(prompts(10)) == ids
                return [
                    sync.training(),
                    sync.ledger(),
                    sync.policy(),
                    sync.get(ids[0]),
                    sync.history(ids[0]),
                    sync.trajectories(ids[0]),
                    sync.list(limit=3, order="value", descending=True),
                    list(sync.iterate(limit=3)),
                    sync.values(ids=ids),
                    sync.values(texts=["q3", "nowhere"]),
                    sync.jobs(),
                    sync.job(job.job_id),
                    list(sync.job_results(job.job_id)),
                    sync.stats().visits,
                    len(sync.preview(4)),
                    sync.ready(),
                ]

        assert await asyncio.to_thread(blocking) == [
            await store.training(),
            await store.ledger(),
            await store.policy(),
            await store.get(ids[0]),
            await store.history(ids[0]),
            await store.trajectories(ids[0]),
            await store.list(limit=3, order="value", descending=True),
            [one async for one in store.iterate(limit=3)],
            await store.values(ids=ids),
            await store.values(texts=["q3", "nowhere"]),
            await store.jobs(),
            await store.job(job.job_id),
            [one async for one in store.job_results(job.job_id)],
            (await store.stats()).visits,
            4,
            True,
        ]
        with pytest.raises(ServiceError, match="404 no prompt") as caught:
            await store.get("f" * 16)
        assert caught.value.status == 404
        with pytest.raises(ServiceError, match="no job"):
            [one async for one in store.job_results("0123456789ab")]


async def test_files_go_in_and_out(store_process: StoreProcess, tmp_path: Path) -> None:  # noqa: F811
    store_process.start()
    lines, recipe, bad = tmp_path / "in.jsonl", tmp_path / "offline_values.json", tmp_path / "bad.jsonl"
    lines.write_text("".join(prompt.model_dump_json() + "\n" for prompt in prompts(3)))
    recipe.write_text('{"q0": [1, 1, 1], "nobody asked": [1]}')
    bad.write_text("rubbish")

    def blocking() -> None:
        with ValueStore(store_process.url) as store:
            assert store.import_file(lines).prompts == 3
            store.export_file(tmp_path / "sync.parquet")
            with pytest.raises(ServiceError, match="line 1: not JSON"):
                store.import_file(bad)
            with pytest.raises(ServiceError, match="no job 0123456789ab"):
                store.export_file(tmp_path / "none.json", job="0123456789ab")

    await asyncio.to_thread(blocking)
    async with AsyncValueStore(store_process.url) as store:
        done = await store.import_file(recipe)
        assert (done.priors, done.unknown) == (1, 1)
        await store.export_file(tmp_path / "async.parquet")
        assert (await store.import_file(tmp_path / "async.parquet")).prompts == 3
        await store.export_file(tmp_path / "out.jsonl")
        assert (await store.import_file(tmp_path / "out.jsonl")).prompts == 3
        [value] = await store.values(texts=["q0"])
        assert value is not None
        assert value.alpha == pytest.approx(8 * 3.5 / 4)
        with pytest.raises(ServiceError, match="no job"):
            await store.export_file(tmp_path / "none.json", job="0123456789ab")


def test_a_store_that_is_away() -> None:
    with ValueStore("http://127.0.0.1:9") as store:
        assert not store.ready()
        with pytest.raises(ServiceError, match=r"GET /v1/training: ConnectError") as caught:
            store.training()
    assert caught.value.status is None


def test_a_reply_that_is_not_known_is_an_error() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"state": "flying"}))
    with (
        ValueStore("http://127.0.0.1:9", transport=transport) as store,
        pytest.raises(ServiceError, match="not what this client knows"),
    ):
        store.training()


def test_bad_arguments_never_reach_the_wire() -> None:
    with ValueStore("http://127.0.0.1:9") as store:
        with pytest.raises(ValueError, match="prior_rewards"):
            store.upsert([NewPrompt(question="q", answer="a", prior_rewards=[1.5])])
        with pytest.raises(ValueError, match="either ids or texts"):
            store.values()
        with pytest.raises(TypeError, match="no such filter: v_hat_mim"):
            store.list(v_hat_mim=0.5)
        with pytest.raises(TypeError, match="no such filter: v_hat_mim"):
            next(store.iterate(v_hat_mim=0.5))


class BreaksOff(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A reply whose connection is lost behind its first bytes."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"half of"
        raise httpx.ReadError("gone")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"half of"
        raise httpx.ReadError("gone")


async def test_an_export_is_whole_or_not_there(tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=BreaksOff()))
    before, new = tmp_path / "before.ndjson", tmp_path / "new.parquet"
    before.write_text("what was exported yesterday")
    with ValueStore("http://127.0.0.1:9", transport=transport) as store:
        for path in (before, new):
            with pytest.raises(ServiceError, match="ReadError: gone"):
                store.export_file(path)
    async with AsyncValueStore("http://127.0.0.1:9", transport=transport) as store:
        for path in (before, new):
            with pytest.raises(ServiceError, match="ReadError: gone"):
                await store.export_file(path)
    assert os.listdir(tmp_path) == [before.name]
    assert before.read_text() == "what was exported yesterday"


async def test_an_import_is_given_the_time_it_takes(tmp_path: Path) -> None:
    """Nothing comes back before all prompts are in: for a million that is half a minute."""
    waits: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        waits.append(request.extensions["timeout"]["read"])
        return httpx.Response(200, json={"prompts": 0, "priors": 0, "unknown": 0})

    path, transport = tmp_path / "in.jsonl", httpx.MockTransport(answer)
    path.write_text("")
    with ValueStore("http://127.0.0.1:9", transport=transport) as store:
        store.import_file(path)
    async with AsyncValueStore("http://127.0.0.1:9", transport=transport) as store:
        await store.import_file(path)
    assert waits == [3600.0, 3600.0]


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(ValueStore) == methods(AsyncValueStore)
