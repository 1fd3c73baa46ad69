"""The demo: prior, evaluation, training, evaluation, report, all through the services of `singlestream up`."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
from rich.console import Console
from rich.table import Table

from singlestream.cli.connect import async_store_of
from singlestream.cli.up import read_prompts
from singlestream.clients.value_store import Job, NewPrompt, Split
from singlestream.config import Config, load_config
from singlestream.contracts import Sampling
from singlestream.errors import ConfigError, DeadlineExceeded, ServiceError
from singlestream.streams.ledger import read_ledger
from singlestream.supervisor.live import show_until
from singlestream.supervisor.supervisor import Supervisor

CONFIGS = {"tiny": Path("configs/demo-cpu.toml"), "smollm2": Path("configs/demo-smollm2-cpu.toml")}
NOTES = {
    "tiny": "A toy on purpose: 0.44 M parameters, warm-started on two-digit products, learn to use the Python tool.",
    "smollm2": "SmolLM2-135M-Instruct learns to answer with only the larger of two numbers.",
}
PRIOR_REWARDS = 2
"""Rewards per training prompt before training; the reference uses 8, which would take the demo as long as training."""
EPISODES_SHOWN = 3
JOB_DEADLINE_S = 900.0
SETTLE_DEADLINE_S = 120.0


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the services and this process, and put the old ones back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


async def demo(model: str, steps: int | None) -> None:
    """Run the demo and write ``report.html``, ``steps.jsonl`` and ``summary.json`` into the run's folder.

    Args:
        model: a key of `CONFIGS`.
        steps: optimizer steps instead of the configuration's.

    Raises:
        ConfigError: this is not the repository's folder, or the model was not made.
        DeadlineExceeded: a phase did not end in time.
    """
    if not CONFIGS[model].exists():
        raise ConfigError(f"no {CONFIGS[model]} in {Path.cwd()}: run the demo in the repository's folder")
    with environment({} if steps is None else {"SINGLESTREAM_RUN__TOTAL_STEPS": str(steps)}):
        config = load_config(CONFIGS[model])
        prompts_path = config.run.model / "prompts.jsonl"
        if not prompts_path.exists():
            raise ConfigError(f"{prompts_path} is missing: run `make {'setup' if model == 'tiny' else 'demo-smollm2'}`")
        await Demo(config, CONFIGS[model], model, read_prompts(prompts_path)).run()


class Demo:
    """One demo run.

    Args:
        config: settings of the run.
        config_path: the file they came from.
        model: a key of `CONFIGS`.
        prompts: of both splits.
    """

    def __init__(self, config: Config, config_path: Path, model: str, prompts: list[NewPrompt]) -> None:
        self.config, self.config_path, self.model, self.prompts = config, config_path, model, prompts
        self.console = Console(markup=False, highlight=False, soft_wrap=True)
        self.store = async_store_of(config)
        self.sampling = Sampling(temperature=config.run.temperature, top_p=1.0, top_k=0)

    async def run(self) -> None:
        """All phases, in order."""
        started = time.monotonic()
        async with Supervisor(self.config, self.config_path, self._say, fresh=True) as supervisor, self.store:
            self._say(
                f"services are up after {time.monotonic() - started:.0f} s; the page: {self.config.value_store.url}/"
            )
            summary, episodes = await supervisor.watch(self._phases(supervisor))
        summary["wall_s"] = time.monotonic() - started
        self._write(summary, episodes)
        self._print(summary)

    def _say(self, text: str) -> None:
        self.console.print(text)

    async def _phases(self, supervisor: Supervisor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        await self.store.upsert(self.prompts)
        self._say(f"{len(self.prompts)} prompts posted; the most visited ones, at any time:")
        self._say(f"  curl '{self.config.value_store.url}/v1/prompts?order=visits&descending=true&limit=3'")
        await self._job("estimate", "train", PRIOR_REWARDS)
        before = await self._job("evaluate", "eval", 1)
        training_since = time.monotonic()
        await self.store.set_training("running")
        await show_until(supervisor, self.console, lambda: supervisor.learner_completed)
        train_wall_s = time.monotonic() - training_since
        after = await self._job("evaluate", "eval", 1)
        episodes = await self._episodes()
        leases = await self._settled_ledger(supervisor)
        steps = self._steps()
        summary = {
            "model": self.model,
            "note": NOTES[self.model],
            "accuracy_before": before.reward_mean,
            "accuracy_after": after.reward_mean,
            "tool_calls_before": before.tool_calls_mean,
            "tool_calls_after": after.tool_calls_mean,
            "n_heldout": after.done,
            "steps": len(steps),
            "trajectories": sum(step["trajectories"] for step in steps),
            "leases": leases,
            "train_wall_s": train_wall_s,
            "restarts": {name: child.restarts for name, child in supervisor.children.items()},
            "machine": {"cores": len(os.sched_getaffinity(0))},
        }
        return summary, episodes

    async def _job(self, purpose: Literal["estimate", "evaluate"], split: Split, n: int) -> Job:
        """Run an estimation or evaluation to its end and return it. Raises `DeadlineExceeded`."""
        started = time.monotonic()
        job = await self.store.create_job(purpose, split=split, n=n, sampling=self.sampling)
        while job.state == "running":
            if time.monotonic() - started > JOB_DEADLINE_S:
                raise DeadlineExceeded(f"{purpose} on {split}: {job.done} of {job.total} episodes", JOB_DEADLINE_S)
            await asyncio.sleep(0.5)
            job = await self.store.job(job.job_id)
        self._say(
            f"{purpose} on {split}: {job.done} episodes, mean reward {job.reward_mean or 0.0:.3f}, "
            f"{job.tool_calls_mean or 0.0:.2f} tool calls each, {time.monotonic() - started:.0f} s"
        )
        return job

    async def _episodes(self) -> list[dict[str, Any]]:
        """Three held-out prompts through the replica's own endpoint, with every token's text and origin."""
        url = f"{self.config.rollout.url}/v1/episodes"
        chosen = [prompt for prompt in self.prompts if prompt.split == "eval"][:EPISODES_SHOWN]
        episodes = []
        async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client:
            for prompt in chosen:
                body = prompt.model_dump(include={"question", "answer", "environment"})
                reply = await client.post(url, json=body)
                if reply.status_code != httpx.codes.OK:
                    raise ServiceError("rollout", f"POST {url}", reply.text[:500], reply.status_code)
                episodes.append({**body, **reply.json()})
        return episodes

    async def _settled_ledger(self, supervisor: Supervisor) -> dict[str, dict[str, int]]:
        """The ledger once the store has applied the last updates: nothing outstanding."""
        deadline = time.monotonic() + SETTLE_DEADLINE_S
        while True:
            ledger = await read_ledger(supervisor.redis, supervisor.keys)
            if all(counts.outstanding == 0 for counts in ledger.values()):
                return {
                    purpose: {"leased": counts.leased, "outstanding": counts.outstanding}
                    | {str(k): v for k, v in counts.ended.items()}
                    for purpose, counts in ledger.items()
                }
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the value store to close every lease ({ledger})", SETTLE_DEADLINE_S)
            await asyncio.sleep(0.2)

    def _steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.config.run.dir / "steps.jsonl").read_text().splitlines()]

    def _write(self, summary: dict[str, Any], episodes: list[dict[str, Any]]) -> None:
        from singlestream.demo.report import write_report

        folder = self.config.run.dir
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        write_report(folder / "report.html", summary, self._steps(), episodes)

    def _print(self, summary: dict[str, Any]) -> None:
        table = Table("", "before", "after", title=f"{summary['n_heldout']} held-out prompts")
        for title, key in (("accuracy", "accuracy"), ("tool calls", "tool_calls")):
            table.add_row(title, f"{summary[key + '_before']:.3f}", f"{summary[key + '_after']:.3f}")
        self.console.print(table)
        self._say(
            f"{summary['trajectories']} trajectories in {summary['steps']} steps, {summary['train_wall_s']:.0f} s of "
            f"training, {summary['wall_s']:.0f} s in all; report: {self.config.run.dir / 'report.html'}"
        )
        self._say(f"to question it further: singlestream up --stay --config {self.config_path}")
