"""`singlestream values` against a running store: tables that people read, and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from redis.asyncio import Redis
from typer.testing import CliRunner

from services.value_store.routes_prompts import SCANNED_PER_PAGE
from singlestream.cli.main import app
from singlestream.clients.value_store import AsyncValueStore, NewPrompt, ValueStore
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys
from singlestream.streams.ledger import prompt_id
from tests.services.value_store.conftest import StoreProcess
from tests.services.value_store.world import World, until

KEYS = Keys(f"cli-values-{os.getpid()}")
BRACKETS = ("Let x be in [a,b]; find f[/tex]", "[bold]What is 1 + 1?[/bold] :smile:")


@pytest.fixture(scope="module")
def store(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    one = StoreProcess(Path(tmp_path_factory.mktemp("values")), KEYS, redis_server.url)
    one.start()
    yield one
    assert one.stop() == 0


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(store: StoreProcess, *arguments: str) -> Result:
    told: Result = CliRunner().invoke(app, [*arguments, "--config", str(store.config)])  # type: ignore[assignment]
    assert told.exit_code == 0, told.output
    return told


def rows(store: StoreProcess, *arguments: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in run(store, *arguments, "--json").output.splitlines()]


def test_files_in_and_out(store: StoreProcess, tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.ndjson"
    prompts = [NewPrompt(question=f"file {i}", answer="a", prior_rewards=[1.0] * i or None) for i in range(3)]
    path.write_text("".join(one.model_dump_json() + "\n" for one in prompts))
    told = run(store, "values", "import", str(path)).output
    assert "│ prompts inserted or updated │      3 │" in told
    assert "│ of these with a prior       │      2 │" in told
    imported = json.loads(run(store, "values", "import", str(path), "--json").output)
    assert imported == {"prompts": 3, "priors": 2, "unknown": 0}
    assert run(store, "values", "export", str(out)).output == f"{out}: {out.stat().st_size} bytes\n"
    told = json.loads(run(store, "values", "export", str(out), "--json").output)
    assert told == {"path": str(out), "bytes": out.stat().st_size}
    assert {"file 0", "file 1", "file 2"} <= {json.loads(line)["question"] for line in out.read_text().splitlines()}


def test_questions_are_shown_as_they_stand(store: StoreProcess) -> None:
    with ValueStore(store.url) as client:
        client.upsert([NewPrompt(question=one, answer="a", source="brackets") for one in BRACKETS])
    for question, text in zip(BRACKETS, ("f[/tex]", "[/BOLD] :smile:"), strict=True):
        told = run(store, "values", "search", text).output
        assert f"│ {question} " in told
        assert f"questions with {text!r}" in told
        [one] = rows(store, "values", "search", text)
        assert one["question"] == question


def test_a_search_goes_through_every_prompt(store: StoreProcess, tmp_path: Path) -> None:
    """A request of it ends after so many; what is asked for stands behind all of them."""
    path, count = tmp_path / "many.jsonl", SCANNED_PER_PAGE + 100
    path.write_text("".join(json.dumps({"question": f"many <{i}>", "answer": "a"}) + "\n" for i in range(count)))
    with ValueStore(store.url) as client:
        client.import_file(path)
        last = max(range(count), key=lambda i: prompt_id("default", f"many <{i}>"))
        assert client.list(q=f"many <{last}>").prompts == [], "the first request does not come so far"
    [one] = rows(store, "values", "search", f"many <{last}>")
    assert one["question"] == f"many <{last}>"
    assert f"many <{last}>" in run(store, "values", "search", f"many <{last}>").output
    assert len(rows(store, "values", "search", "MANY", "--limit", "7")) == 7


async def test_a_prompts_updates_and_the_table_at_a_glance(store: StoreProcess, redis: Redis) -> None:
    world = World(redis, KEYS)
    await world.start()
    await world.publish(0)
    async with AsyncValueStore(store.url) as client:
        await client.upsert([NewPrompt(question=f"trained {i}", answer="a") for i in range(8)])
        await client.set_training("running")

        async def trained() -> bool:
            await world.report()
            await world.play()
            await world.train()
            return (await client.training()).trained >= 8

        await until(trained, "8 trained")
        await client.set_training("paused")

        async def quiet() -> bool:
            await world.play()
            await world.train()
            return (await client.ledger()).train.outstanding == 0

        await until(quiet, "the rest")
    [top] = rows(store, "values", "top", "--order", "visits", "--limit", "1")
    assert top["visits"]
    assert f"{top['weight']:.3f} │ {top['v_hat']:.3f}" in run(store, "values", "top", "--order", "visits").output
    shown = json.loads(run(store, "values", "show", str(top["prompt_id"]), "--json").output)
    assert shown["question"] == top["question"]
    assert len(shown["updates"]) == shown["visits"]
    told = run(store, "values", "show", str(top["prompt_id"])).output
    assert f"│ {shown['question']} " in told
    for one in shown["updates"]:
        assert f"│ {one['lease_id']} " in told
        assert f"{one['v_hat_before']:.3f} → {one['v_hat_after']:.3f}" in told
    stats = json.loads(run(store, "values", "stats", "--json").output)
    told = run(store, "values", "stats").output
    assert f"{stats['prompts']} ({stats['prompts_train']})" in told
    assert f"of {stats['sampling_entropy_max_nats']:.2f} nats" in told
    assert stats["visits"] >= 8
    ledger = json.loads(run(store, "ledger", "--json").output)
    assert ledger["train"]["adds_up"]
    assert ledger["train"]["trained"] >= 8
