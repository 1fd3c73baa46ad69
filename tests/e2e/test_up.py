"""`singlestream up` as a user runs it: values over REST while it trains, Ctrl-C, and the same command again goes on."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from singlestream.config import Config, load_config
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from singlestream.streams.ledger import read_ledger
from singlestream.supervisor.status import read_steps
from tests.e2e.conftest import DEMO, ROOT
from tests.processes import gone

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "singlestream.cli.main", *arguments]


def ask(*arguments: str) -> str:
    """What the command prints about the run."""
    command = [*cli(*arguments), "--config", str(DEMO)]
    reply = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert reply.returncode == 0, reply.stderr
    return reply.stdout


def until(condition: Callable[[], object], what: str, deadline_s: float = 240.0) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < deadline_s, f"waited for {what}"
        time.sleep(0.2)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    main = psutil.Process(process.pid)
    return [main, *main.children(recursive=True)]


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(cli("up", "--config", str(DEMO), *arguments), cwd=ROOT, stdout=output, stderr=output)


async def check_ledger(config: Config) -> None:
    """From Redis alone, after everything has stopped."""
    server = EmbeddedRedis(config.run.dir / "redis")
    server.start()
    redis = connect(server.url)
    try:
        train = (await read_ledger(redis, Keys(config.run.name)))["train"]
        assert train.adds_up
        assert train.ended["trained"] + train.outstanding == config.run.total_steps * config.run.train_batch_size
        assert train.ended["failed"] == 0
    finally:
        await redis.aclose()
        server.stop()


def check_values(config: Config) -> None:
    """Over REST: what the first steps taught about a prompt."""

    def most_visited() -> dict[str, float]:
        query = {"order": "visits", "descending": True, "limit": 1}
        [prompt] = httpx.get(f"{config.value_store.url}/v1/prompts", params=query, timeout=60).json()["prompts"]
        return prompt

    until(lambda: most_visited()["visits"] >= 1, "an update of the learner's to be applied")
    prompt = most_visited()
    assert {"alpha", "beta", "v_hat", "n_eff", "visits"} <= set(prompt)
    assert prompt["v_hat"] == pytest.approx(prompt["alpha"] / (prompt["alpha"] + prompt["beta"]))


def check_an_episode_that_computes(config: Config) -> None:
    """Over HTTP, with the real engine and the real sandbox: the product comes from the tool, not from the model."""
    url = f"{config.rollout.url}/v1/episodes"
    body = {"question": "97*89=?", "answer": "8633", "environment": "tiny_tool"}
    for _ in range(40):  # the model calls the tool in two of five episodes before it is trained
        trace = httpx.post(url, json=body, timeout=120).json()
        if trace["tool_calls"] and trace["reward"] == 1.0:
            break
    else:
        raise AssertionError(f"no episode of 40 used the tool and was right; the last: {trace['text']}")
    kinds = [segment["kind"] for segment in trace["segments"]]
    assert kinds[:2] == ["prompt", "generated"]
    observations = [segment["text"] for segment in trace["segments"] if segment["kind"] == "observation"]
    assert observations[0] == "<interpreter>8633</interpreter>"
    generated = [segment for segment in trace["segments"] if segment["kind"] == "generated"]
    assert generated[0]["text"] == "<code>print(97*89)</code>"
    assert all(len(one["logprobs"]) == len(one["token_ids"]) and one["version"] >= 0 for one in generated)
    assert trace["tool_calls"][0]["status"] == "ok"


def check_a_pinned_evaluation_during_training() -> None:
    """One policy version samples everything although the learner goes on publishing."""
    told = json.loads(ask("eval", "--limit", "16", "--n", "2", "--json"))
    assert told["versions"] == {str(told["policy"]["version"]): 32}
    assert [one["samples"] for one in told["benchmarks"]] == [32]


def test_up_values_stop_and_go_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINGLESTREAM_RUN__TOTAL_STEPS", "24")
    config = load_config(DEMO)
    log, steps_path = tmp_path / "up.log", config.run.dir / "steps.jsonl"
    up = start(log, "--prompts", str(config.run.model / "prompts.jsonl"))
    try:
        until(lambda: len(read_steps(steps_path)) >= 2 or up.poll() is not None, "two steps")
        assert up.poll() is None, log.read_text()
        assert "paused" in ask("training", "paused")  # else a fast machine would have trained it all before the checks
        check_values(config)
        assert json.loads(ask("ledger", "--json"))["train"]["adds_up"]
        assert "n_eff" in ask("values", "top", "--limit", "3")
        check_an_episode_that_computes(config)
        assert "running" in ask("training", "running")
        check_a_pinned_evaluation_during_training()
        everyone = family(up)
        up.send_signal(signal.SIGINT)
        assert up.wait(150) == 130
        until(lambda: all(gone(process) for process in everyone), "every process to end", 60)
    finally:
        if up.poll() is None:
            up.kill()
    stopped_at = len(read_steps(steps_path, count=1000))
    assert stopped_at < config.run.total_steps

    again = start(log)
    try:
        assert again.wait(600) == 0, log.read_text()
    finally:
        if again.poll() is None:
            again.kill()
    assert [step["step"] for step in read_steps(steps_path, count=1000)] == list(range(1, config.run.total_steps + 1))
    asyncio.run(check_ledger(config))
    assert not config.run.weights_path.exists()
