"""`singlestream estimate` and `singlestream eval` against a store in a process of its own and a replica."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.rollout.worker import RolloutWorker
from singlestream.cli.up import read_prompts
from singlestream.cli.watch import JobFailed, watch
from singlestream.clients.value_store import AsyncValueStore, Job, NewPrompt, ValueStore
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import DeadlineExceeded
from singlestream.streams import Keys
from tests.services.rollout.scripted import ScriptedEngine
from tests.services.rollout.site import TOKENIZER, Site, Working, until
from tests.services.value_store.conftest import StoreProcess

pytestmark = pytest.mark.timeout(600)

PROMPTS, REWARDS = 30, 4
DEADLINE_S = 240.0


class Engine(ScriptedEngine):
    """Boxes 7, every third time 8; after ``hangs_after`` turns it says nothing more."""

    said, hangs_after = 0, 10**9

    async def generate(self, request_id, request):  # type: ignore[no-untyped-def]
        self.said += 1
        if self.said > self.hangs_after:
            await asyncio.Event().wait()
        held = self.held
        self.versions = lambda _: held
        self.script = ["\\boxed{8}" if self.said % 3 == 0 else "\\boxed{7}"]
        return await super().generate(request_id, request)


@pytest.fixture
async def store(tmp_path: Path, keys: Keys, redis_server: EmbeddedRedis) -> AsyncIterator[StoreProcess]:
    one = StoreProcess(tmp_path, keys, redis_server.url)
    await asyncio.to_thread(one.start)
    yield one
    await asyncio.to_thread(one.stop)


class Command:
    """A running `singlestream` command."""

    def __init__(self, store: StoreProcess, *arguments: str) -> None:
        self.arguments = [sys.executable, "-m", "singlestream.cli.main", *arguments, "--config", str(store.config)]

    async def start(self) -> Command:
        self.process = await asyncio.create_subprocess_exec(
            *self.arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
        )
        return self

    async def told(self, code: int = 0) -> str:
        output, _ = await asyncio.wait_for(self.process.communicate(), DEADLINE_S)
        assert self.process.returncode == code, output.decode()
        return output.decode()


def worker(site: Site, name: str, engine: Engine) -> Working:
    return Working(site.worker(name, engine, lease_timeout_s=2.0))


async def test_an_estimation_killed_in_the_middle_goes_on_without_doing_a_prompt_twice(
    redis: Redis, keys: Keys, tmp_path: Path, store: StoreProcess
) -> None:
    site = Site(redis, keys, tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    rows = [NewPrompt(question=f"{i}+7=?", answer="7", source="sums", environment="tiny_tool") for i in range(PROMPTS)]
    prompts.write_text("\n".join(row.model_dump_json() for row in rows))
    arguments = ("estimate", "--n", str(REWARDS), "--prompts", str(prompts), "--export", str(tmp_path / "offline.json"))

    first = await Command(store, *arguments).start()
    engine = Engine(TOKENIZER, [])
    engine.hangs_after = 20
    dying = site.worker("a", engine, lease_timeout_s=2.0)
    async with AsyncValueStore(store.url) as client:
        work = asyncio.create_task(dying.run())
        await until(lambda: _done(client, 20), "twenty results", DEADLINE_S)
        await until(lambda: _held(dying), "leases in the replica's hands")
        first.process.kill()
        await first.process.wait()
        episodes = [running.task for running in dying.running.values() if running.task]
        for task in (*episodes, work):  # it dies with leases in its hands: nothing is handed over
            task.cancel()
        await asyncio.gather(*episodes, work, return_exceptions=True)
        store.kill()
        await asyncio.to_thread(store.start)
        before = (await client.jobs())[0]
        assert (before.done, before.total) == (20, PROMPTS * REWARDS)
        async with worker(site, "b", Engine(TOKENIZER, [])):
            told = await (await Command(store, *arguments).start()).told()
        assert before.job_id in told
        [job] = await client.jobs()
        results = [one async for one in client.job_results(job.job_id)]
        ids = await client.upsert(rows)
        values = await client.values(ids=ids)
    assert (job.done, job.failed, job.state) == (PROMPTS * REWARDS, 0, "finished")
    assert Counter((one.prompt_id, one.repetition) for one in results) == {
        (one, repetition): 1 for one in ids for repetition in range(REWARDS)
    }
    assert len({one.lease_id for one in results}) == PROMPTS * REWARDS
    # what was done before the kill has not been done again
    scored = int(await redis.hget(keys.ledger, "estimate:scored"))
    assert scored == PROMPTS * REWARDS
    offline = json.loads((tmp_path / "offline.json").read_text())
    assert {question: len(scores) for question, scores in offline.items()} == {row.question: REWARDS for row in rows}
    for row, value in zip(rows, values, strict=True):
        assert value is not None
        successes = sum(offline[row.question])
        assert value.alpha == pytest.approx(8 * (successes + 0.5) / (REWARDS + 1))


async def _held(worker: RolloutWorker) -> bool:
    return len(worker.running) == worker.settings.slots


async def _done(client: AsyncValueStore, count: int) -> bool:
    jobs = await client.jobs()
    return bool(jobs) and jobs[0].done >= count


async def test_an_evaluation_by_name_is_told_as_json_and_as_a_table(
    redis: Redis, keys: Keys, tmp_path: Path, store: StoreProcess
) -> None:
    site, out = Site(redis, keys, tmp_path), tmp_path / "out.json"
    await site.publish(3)
    for name in ("aime_2024", "aime_2025"):
        rows = [{"problem": f"{name}: {i}", "answer": "7"} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets = [f"{name}={tmp_path / name}.jsonl" for name in ("aime_2024", "aime_2025")]
    arguments = ("eval", *datasets, "--n", "6", "--environment", "tiny_tool", "--out", str(out))
    async with worker(site, "a", Engine(TOKENIZER, [])):
        told = await (await Command(store, *arguments).start()).told()
        unpinned = json.loads(
            re.search(
                r"^\{.*^\}",
                await (await Command(store, *arguments, "--no-pinned", "--json").start()).told(),
                re.M | re.S,
            )[0]  # type: ignore[index]
        )
    report = json.loads(out.read_text())
    assert unpinned["policy"] is None
    assert unpinned["versions"] == {"3": 60}
    assert report["job"] == unpinned["job"]  # the last one was written to the same file
    assert "policy 3.1, 6 samples a prompt" in told
    assert re.search(r"aime_2024 .* 5 .*\d+\.\d .*\n.* [\d.]+–[\d.]+ ", told)
    assert re.search(r"mean ", told)
    for benchmark, name in zip(report["benchmarks"], ("aime_2024", "aime_2025"), strict=True):
        assert (benchmark["name"], benchmark["prompts"], benchmark["samples"], benchmark["failed"]) == (name, 5, 30, 0)
        assert set(benchmark["pass"]) == set(benchmark["maj"]) == {"1", "2", "4", "6"}
        avg = benchmark["avg"]
        assert avg["low"] <= avg["value"] <= avg["high"]
        assert benchmark["pass"]["1"]["value"] == pytest.approx(avg["value"])
        assert benchmark["pass"]["6"]["value"] == 1.0
    assert report["sampling"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    unknown = await (await Command(store, "eval", "no_such").start()).told(1)
    assert "no_such" in unknown


def test_a_line_of_prompts_ends_at_its_line_feed_alone(tmp_path: Path) -> None:
    rows = [NewPrompt(question="one\u2028two\u0085three", answer="7"), NewPrompt(question="four", answer="7")]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{row.model_dump_json()}\n\n" for row in rows))
    assert read_prompts(tmp_path / "prompts.jsonl") == rows


async def test_what_a_job_waits_for_is_told(store: StoreProcess) -> None:
    with ValueStore(store.url) as client:
        await asyncio.to_thread(client.upsert, [NewPrompt(question="1", answer="1", source="s", split="eval")])
        told = await (await Command(store, "eval", "--n", "1", "--stall-s", "1").start()).told(1)
        assert re.search(r"job [0-9a-f]{12}, 0 of 1 done, for a rollout replica: none has reported", told)
        [job] = client.jobs()
        listed = await (await Command(store, "jobs", "list").start()).told()
        assert job.job_id in listed
        assert "none has reported" in listed
        assert "failed" in await (await Command(store, "jobs", "cancel", job.job_id).start()).told()
        with pytest.raises(JobFailed, match="cancelled by request"):
            watch(client, client.job(job.job_id), _quiet(), 60.0)
        running = client.create_job("evaluate", split="eval")
        with pytest.raises(DeadlineExceeded, match="none has reported"):
            watch(client, running, _quiet(), 0.5)
        assert isinstance(running, Job)


def _quiet():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console(quiet=True)
