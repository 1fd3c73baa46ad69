"""A whole run goes from one rollout replica to two and back while it trains: ``python -m benchmarks.scaling``.

Real services, the demo's model and task; replicas have few slots, so that generation is what the learner waits for.
Nothing is restarted; every lease must end once. Needs ``make setup``. All services share this machine's cores: where
two engines do not have a core each beside the learner's, the second adds less than the first.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Figure, run
from singlestream.cli.connect import async_store_of
from singlestream.cli.up import read_prompts
from singlestream.config import Config, load_config
from singlestream.contracts import Trajectory, decode
from singlestream.streams.ledger import read_ledger
from singlestream.supervisor.status import read_steps
from singlestream.supervisor.supervisor import Supervisor

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo-cpu.toml"
WINDOW_S, QUICK_S = 25.0, 8.0
CHANGE_S = 600.0
"""A replica may take so long to start or to leave, on a busy machine."""
LOG_LINES = 20
"""Of the rollout service, where it took longer."""


def settings(folder: Path) -> Config:
    """The demo's, in a folder and on ports of its own."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    store, sandbox, rollout, metrics = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    values = {
        "RUN__NAME": f"scaling-{os.getpid()}",
        "RUN__MODEL": ROOT / ".cache" / "models" / "tiny",
        "RUN__RUNS_DIR": folder,
        "RUN__TOTAL_STEPS": 100_000,
        "RUN__TRAIN_BATCH_SIZE": 32,
        "RUN__MAX_STALENESS": 8,
        "ROLLOUT__SLOTS": 8,
        "VALUE_STORE__PORT": store,
        "SANDBOX_GATEWAY__PORT": sandbox,
        "ROLLOUT__PORT": rollout,
        "LEARNER__METRICS_PORT": metrics,
    }
    os.environ.update({f"SINGLESTREAM_{name}": str(value) for name, value in values.items()})
    return load_config(DEMO)


@dataclass
class Window:
    """What ended while one number of replicas ran."""

    seconds: float = 0.0
    episodes: int = 0
    tokens: int = 0
    steps: int = 0


class Scaling:
    """The run under measurement.

    Args:
        supervisor: its services.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor, self.redis, self.keys = supervisor, supervisor.redis, supervisor.keys

    def steps(self) -> int:
        """Optimizer steps so far."""
        last = read_steps(self.supervisor.config.run.dir / "steps.jsonl", count=1)
        return int(last[-1]["step"]) if last else 0

    async def until_trained(self, steps: int) -> None:
        """Wait for so many optimizer steps."""
        started = time.monotonic()
        while self.steps() < steps:
            if time.monotonic() - started > CHANGE_S:
                raise TimeoutError(f"{self.steps()} steps after {CHANGE_S:.0f} s")
            await asyncio.sleep(0.2)

    async def replicas(self) -> int:
        """Replicas that have reported lately."""
        told = [json.loads(report) for report in (await self.redis.hgetall(self.keys.replicas)).values()]
        return sum(time.time() - one["at_s"] < 5.0 for one in told)

    async def scale(self, wanted: int) -> float:
        """``singlestream scale rollout N``; returns the seconds until so many replicas work."""
        started = time.monotonic()
        scale = [sys.executable, "-m", "singlestream.cli.main", "scale", "rollout", str(wanted), f"--config={DEMO}"]
        await asyncio.to_thread(subprocess.run, scale, check=True, timeout=60)
        while await self.replicas() != wanted:
            if time.monotonic() - started > CHANGE_S:
                log = (self.supervisor.config.run.dir / "logs" / "rollout.log").read_text(errors="replace")
                print(*log.splitlines()[-LOG_LINES:], sep="\n")
                raise TimeoutError(f"{await self.replicas()} replicas after {CHANGE_S:.0f} s, not {wanted}")
            await asyncio.sleep(0.2)
        return time.monotonic() - started

    async def window(self, seconds: float) -> Window:
        """Watch the stream of trajectories for so long."""
        found, steps = Window(), self.steps()
        newest = await self.redis.xrevrange(self.keys.trajectories, count=1)
        cursor, started = newest[0][0] if newest else b"0-0", time.monotonic()
        while found.seconds < seconds:
            await asyncio.sleep(0.2)
            found.seconds = time.monotonic() - started
            for entry, fields in await self.redis.xrange(self.keys.trajectories, min=b"(" + cursor):
                cursor = entry
                message = decode(fields[b"m"])
                if isinstance(message, Trajectory):
                    found.episodes += 1
                    found.tokens += message.action_tokens
        found.steps = self.steps() - steps
        return found


async def _measure(folder: Path, window_s: float) -> list[Figure]:
    config = settings(folder)
    figures = []
    async with Supervisor(config, DEMO) as supervisor, async_store_of(config) as store:
        scaling = Scaling(supervisor)
        prompts = read_prompts(config.run.model / "prompts.jsonl")
        await store.upsert([prompt for prompt in prompts if prompt.split == "train"])
        await store.set_training("running")
        await scaling.until_trained(3)
        for when, replicas in (("before", 1), ("during", 2), ("after", 1)):
            change_s = await scaling.scale(replicas)
            one = await scaling.window(window_s)
            note = f"replicas: {replicas}; {one.episodes / one.seconds:.1f} episodes/s, {one.steps} steps"
            note += f" in {one.seconds:.0f} s; {len(os.sched_getaffinity(0))} cores for all services"
            figures.append(Figure(f"scaling_{when}_tokens", one.tokens / one.seconds, "tokens/s", note))
            if when != "before":
                figures.append(Figure(f"scaling_to_{replicas}_s", change_s, "s", "command to the replicas' reports"))
        ledger = (await read_ledger(supervisor.redis, supervisor.keys))["train"]
        restarts = sum(child.restarts for child in supervisor.children.values())
        if restarts or ledger.ended["failed"] or not ledger.adds_up:
            raise RuntimeError(f"{restarts} restarts; {ledger}")
        figures.append(Figure("scaling_leases_ended", sum(ledger.ended.values()), "leases", "none failed, no restart"))
    return figures


def measure(quick: bool) -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="ss-") as name:
        return asyncio.run(_measure(Path(name), QUICK_S if quick else WINDOW_S))


if __name__ == "__main__":
    run("scaling", measure)
