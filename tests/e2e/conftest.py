"""A whole run on free ports: real Redis, sandbox, store, Ray with a vLLM replica, and learner."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from singlestream.cli.connect import async_store_of
from singlestream.cli.up import read_prompts
from singlestream.clients.value_store import AsyncValueStore
from singlestream.config import Config, load_config
from singlestream.streams.ledger import read_ledger
from singlestream.supervisor.status import read_steps
from singlestream.supervisor.supervisor import Supervisor
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "configs" / "demo-cpu.toml"

_numbers = itertools.count(1)


def ports() -> dict[str, str]:
    """Settings that give each service a port of its own."""
    places = ("VALUE_STORE__PORT", "SANDBOX_GATEWAY__PORT", "ROLLOUT__PORT", "LEARNER__METRICS_PORT")
    return {f"SINGLESTREAM_{place}": str(free_port()) for place in places}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The demo's settings with small steps, in a folder and on ports of its own."""
    settings = {
        "RUN__NAME": f"e2e-{os.getpid()}-{next(_numbers)}",
        "RUN__MODEL": str(ROOT / ".cache" / "models" / "tiny"),
        "RUN__RUNS_DIR": str(tmp_path),
        "RUN__TOTAL_STEPS": "12",
        "RUN__TRAIN_BATCH_SIZE": "32",
        "ROLLOUT__SLOTS": "16",
        "ROLLOUT__LEASE_TIMEOUT_S": "8",
        "SANDBOX_GATEWAY__SLOTS": "2",
        "LEARNER__CHECKPOINT_EVERY": "3",
    }
    for name, value in ({f"SINGLESTREAM_{name}": value for name, value in settings.items()} | ports()).items():
        monkeypatch.setenv(name, value)
    return load_config(DEMO)


def _command_line(process: psutil.Process) -> str:
    """Empty for a zombie."""
    return " ".join(process.as_dict(["cmdline"], ad_value=[])["cmdline"])


class Run:
    """A run under test.

    Args:
        supervisor: its services.
        store: a client of its value store.
    """

    def __init__(self, supervisor: Supervisor, store: AsyncValueStore) -> None:
        self.supervisor, self.store = supervisor, store
        self.config = supervisor.config

    def steps(self) -> list[dict[str, object]]:
        return read_steps(self.config.run.dir / "steps.jsonl", count=10_000)

    async def until(self, condition: Callable[[], object], what: str, deadline_s: float = 240.0) -> None:
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < deadline_s, f"waited for {what}; {await self.ledger()}"
            await asyncio.sleep(0.1)

    async def ledger(self) -> object:
        return await read_ledger(self.supervisor.redis, self.supervisor.keys)

    def process(self, service: str, *marks: str) -> psutil.Process:
        """The service's process, or its one descendant whose command line has all marks."""
        main = psutil.Process(self.supervisor.children[service].pid)
        if not marks:
            return main
        found = [p for p in main.children(recursive=True) if all(mark in _command_line(p) for mark in marks)]
        assert found, f"no process of {service} has {marks}"
        return found[0]

    async def finished_cleanly(self) -> None:
        """The learner trains every step, and the ledger adds up with nothing outstanding and nothing failed."""
        await self.until(lambda: self.supervisor.learner_completed, "the learner to train all steps")
        deadline = time.monotonic() + 60
        while True:
            ledger = await read_ledger(self.supervisor.redis, self.supervisor.keys)
            assert all(counts.adds_up for counts in ledger.values())
            if ledger["train"].outstanding == 0:
                break
            assert time.monotonic() < deadline, f"leases stay open: {ledger}"
            await asyncio.sleep(0.2)
        train, run = ledger["train"], self.config.run
        assert train.ended["trained"] == run.total_steps * run.train_batch_size
        assert train.ended["failed"] == 0
        steps = self.steps()
        assert [step["step"] for step in steps] == list(range(1, run.total_steps + 1))
        assert all(step["staleness_max"] <= run.staleness_bound for step in steps)


@pytest.fixture
def running(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[Run], Awaitable[None]]], Awaitable[None]]:
    """Start a run, wait until training has begun, and hand it to the test's body."""

    async def start(body: Callable[[Run], Awaitable[None]]) -> None:
        async with Supervisor(config, DEMO) as supervisor, async_store_of(config) as store:
            run = Run(supervisor, store)
            prompts = read_prompts(config.run.model / "prompts.jsonl")
            await store.upsert([prompt for prompt in prompts if prompt.split == "train"][:512])
            await store.set_training("running")
            await supervisor.watch(body(run))

    return start
