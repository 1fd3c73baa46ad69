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

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "singlestream.cli.main", *arguments]


def until(condition: Callable[[], object], what: str, deadline_s: float = 240.0) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < deadline_s, f"waited for {what}"
        time.sleep(0.2)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    main = psutil.Process(process.pid)
    return [main, *main.children(recursive=True)]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


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


def check_an_episode_that_computes(config: Config) -> None:
    """Over HTTP, with the real engine and the real sandbox: the product comes from the tool, not from the model."""
    url = f"http://{config.rollout.host}:{config.rollout.port}/v1/episodes"
    body = {"question": "97*89=?", "answer": "8633", "environment": "tiny_tool"}
    for _ in range(40):  # the model calls the tool in two of five episodes before it is trained
        trace = httpx.post(url, json=body, timeout=60).json()
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
    command = cli("eval", "--config", str(DEMO), "--limit", "16", "--n", "2", "--json")
    told = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert told["versions"] == {str(told["policy"]["version"]): 32}
    assert [one["samples"] for one in told["benchmarks"]] == [32]


def test_up_values_stop_and_go_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINGLESTREAM_RUN__TOTAL_STEPS", "24")  # so many that it is still training after the checks
    config = load_config(DEMO)
    log, steps_path = tmp_path / "up.log", config.run.dir / "steps.jsonl"
    up = start(log, "--prompts", str(config.run.model / "prompts.jsonl"))
    try:
        until(lambda: len(read_steps(steps_path)) >= 2 or up.poll() is not None, "two steps")
        assert up.poll() is None, log.read_text()
        url = f"http://{config.value_store.host}:{config.value_store.port}"
        page = httpx.get(f"{url}/v1/prompts", params={"order": "visits", "descending": True, "limit": 1}).json()
        [prompt] = page["prompts"]
        assert {"alpha", "beta", "v_hat", "n_eff", "visits"} <= set(prompt)
        assert prompt["visits"] >= 1
        assert prompt["v_hat"] == pytest.approx(prompt["alpha"] / (prompt["alpha"] + prompt["beta"]))
        ledger = json.loads(
            subprocess.run(
                cli("ledger", "--config", str(DEMO), "--json"), cwd=ROOT, capture_output=True, check=True
            ).stdout
        )
        assert ledger["train"]["adds_up"]
        table = subprocess.run(
            cli("values", "top", "--config", str(DEMO), "--limit", "3"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "n_eff" in table
        check_an_episode_that_computes(config)
        check_a_pinned_evaluation_during_training()
        everyone = family(up)
        up.send_signal(signal.SIGINT)
        assert up.wait(90) == 130
        until(lambda: all(gone(process) for process in everyone), "every process to end", 20)
    finally:
        if up.poll() is None:
            up.kill()
    stopped_at = len(read_steps(steps_path, count=1000))
    assert stopped_at < config.run.total_steps

    again = start(log)
    try:
        assert again.wait(400) == 0, log.read_text()
    finally:
        if again.poll() is None:
            again.kill()
    assert [step["step"] for step in read_steps(steps_path, count=1000)] == list(range(1, config.run.total_steps + 1))
    asyncio.run(check_ledger(config))
    assert not config.run.weights_path.exists()
