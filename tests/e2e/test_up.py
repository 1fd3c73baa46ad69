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

from singlestream.config import Config
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


def test_up_values_stop_and_go_on(config: Config, tmp_path: Path) -> None:
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
