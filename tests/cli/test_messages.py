"""What a user is told who mistypes, or asks a run that is not up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from singlestream.cli.connect import async_store_of
from singlestream.cli.main import app, run_until_signal
from singlestream.cli.up import begin, check_environments, read_prompts
from singlestream.clients.value_store import NewPrompt
from singlestream.config import load_config
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import ConfigError
from singlestream.streams import Keys
from tests.services.value_store.conftest import StoreProcess


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))  # type: ignore[return-value]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    text = (
        f'[run]\nname = "r"\nmodel = "m"\ntotal_steps = 3\nruns_dir = "{tmp_path}"\nredis_url = "redis://127.0.0.1:9"\n'
    )
    ports = "".join(f"[{name}]\nport = 9\n" for name in ("value_store", "rollout", "sandbox_gateway"))
    path.write_text(text + ports)
    return path


def test_a_run_that_is_not_up(config: Path) -> None:
    for command in (["values", "top"], ["ledger"], ["scale", "rollout", "2"], ["training", "paused"]):
        told = run(*command, "--config", str(config))
        assert told.exit_code == 1
        assert f"singlestream up --stay --config {config}" in told.output
    told = run("status", "--config", str(config))
    assert told.exit_code == 1
    assert "value_store: waiting for an answer from http://127.0.0.1:9/readyz" in told.output
    assert f"singlestream up --stay --config {config}" in told.output


def test_a_file_that_cannot_be_used(config: Path, tmp_path: Path) -> None:
    told = run("values", "export", str(tmp_path / "values.csv"), "--config", str(config))
    assert told.exit_code == 1
    assert ".parquet" in told.output
    (tmp_path / "r").write_text("a file where the run's folder would be")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    config.write_text(config.read_text().replace('"m"', f'"{tmp_path}/m"'))
    told = run("up", "--config", str(config))
    assert told.exit_code == 1
    assert told.output == f"error: {tmp_path}/r: File exists\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["scale", "rollout", "0"], "at least 1"),
        (["estimate", "--export", "values.v1"], "name it values.v1.json"),
        (["eval", "--top-p", "0"], "0.0 is not in (0, 1]"),
    ],
    ids=["scale", "export", "top-p"],
)
def test_a_value_that_cannot_be_is_told_before_anything_is_asked(config: Path, command: list[str], says: str) -> None:
    told = run(*command, "--config", str(config))
    assert told.exit_code == 2
    assert says in " ".join(told.output.replace("│", " ").split())  # out of its box, whatever the terminal's width


def test_a_line_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": "q", "split": "test", "prior_rewards": [2]}\n')
    with pytest.raises(ConfigError, match=r"prompts.jsonl:2: answer: is missing; split: .*; prior_rewards.0: .*less"):
        read_prompts(path)


def test_environments_are_looked_for_before_anything_starts() -> None:
    def prompt(environment: str) -> NewPrompt:
        return NewPrompt(question="q", answer="a", environment=environment)

    check_environments(
        [prompt("examples.own_task:Calculator"), prompt("math_python/verl:examples.own_task:compute_score")]
    )
    with pytest.raises(ConfigError, match=r"'guessing': none of math_python(.|\n)*no attribute 'nosuch'"):
        check_environments([prompt("guessing"), prompt("tiny_tool/examples.own_task:nosuch")])


def another_run_is_told_apart(config: Path, name: str) -> None:
    """Its services answer on this run's ports: what they say, and what they would do, is not this run's."""
    other = ["--config", str(config.with_name("other.toml"))]
    Path(other[1]).write_text(config.read_text().replace(f'"{name}"', '"other"'))
    told = run("status", *other)
    url = load_config(config).value_store.url
    assert f"value_store: waiting for its port: {url} serves run '{name}'" in told.output
    assert "training:" not in told.output
    for command in (["training", "stopped"], ["values", "top"]):
        told = run(*command, *other)
        assert told.exit_code == 1
        assert f"serves run '{name}', not 'other'" in told.output


async def test_the_status_of_a_run(tmp_path: Path, keys: Keys, redis_server: EmbeddedRedis) -> None:
    store = StoreProcess(tmp_path, keys, redis_server.url)
    await asyncio.to_thread(store.start)
    try:
        config = ["--config", str(store.config)]
        told = await asyncio.to_thread(run, "status", *config)
        assert told.exit_code == 1  # there is no replica
        assert "training: paused; 0 of" in told.output
        assert "value_store: ready" in told.output
        assert "learner: waiting for its first heartbeat" in told.output
        told = await asyncio.to_thread(run, "ledger", *config)
        assert "│ outstanding │" in told.output
        await asyncio.to_thread(another_run_is_told_apart, store.config, keys.run)
        async with async_store_of(load_config(store.config)) as client:
            await begin(client)
            assert (await client.training()).state == "running"
            told = await asyncio.to_thread(run, "training", "stopped", *config)
            assert told.output.startswith("training: stop")
            await begin(client)  # as `up` does with a run that has ended, to look at it
        told = await asyncio.to_thread(run, "training", "running", *config)
        assert told.exit_code == 1
        assert "cannot be taken back" in told.output
        told = await asyncio.to_thread(run, "values", "top", *config)
        assert told.output == "no prompts\n"
        told = await asyncio.to_thread(run, "values", "top", "--json", *config)
        assert [json.loads(line) for line in told.output.splitlines()] == []
        told = await asyncio.to_thread(run, "jobs", "list", *config)
        assert told.output.startswith("no jobs")
    finally:
        await asyncio.to_thread(store.stop)


def test_a_second_ctrl_c_does_not_cut_the_stop_short(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(30):
                while "still stopping" not in capsys.readouterr().err:
                    await asyncio.sleep(0.01)
            stopped.append("the services")

    with pytest.raises(typer.Exit):
        run_until_signal(work())
    assert stopped == ["the services"]
