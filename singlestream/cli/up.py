"""`singlestream up`: one machine's services, and a line that says where the run stands."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from singlestream.cli.connect import async_store_of
from singlestream.clients.value_store import AsyncValueStore, NewPrompt
from singlestream.config import load_config
from singlestream.errors import ConfigError
from singlestream.supervisor.live import show_until
from singlestream.supervisor.supervisor import Supervisor
from singlestream.validation import problems

IMPORT_S = 120.0
"""Environments and graders must be imported within this."""


def read_prompts(path: Path) -> list[NewPrompt]:
    """Prompts of a JSONL file. Raises `ConfigError` that names the line which is no prompt."""
    prompts = []
    for number, line in enumerate(path.read_text().split("\n"), start=1):  # a question may hold U+2028 or U+0085
        try:
            if line.strip():
                prompts.append(NewPrompt.model_validate_json(line))
        except ValidationError as error:
            raise ConfigError(f"{path}:{number}: {problems(error, NewPrompt)}") from error
    return prompts


def check_environments(prompts: list[NewPrompt]) -> None:
    """Raise `ConfigError` if what the prompts name as environment or grader cannot be imported from here."""
    names = sorted({prompt.environment for prompt in prompts})
    # a service's own command: this package imports no service
    command = [sys.executable, "-m", "services.rollout.environments", *names]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, check=False, timeout=IMPORT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{', '.join(names)}: not imported after {IMPORT_S:.0f} s") from None
    if reply.returncode != 0:
        raise ConfigError(reply.stderr.strip())


async def begin(store: AsyncValueStore) -> None:
    """Let a paused run train; one that has stopped or finished stays as it is."""
    if (await store.training()).state == "paused":
        await store.set_training("running")


async def up(config_path: Path, prompts: Path | None, paused: bool, stay: bool) -> None:
    """Start everything, post the prompts, train until all steps are done or the task is cancelled.

    Args:
        config_path: the run's TOML file.
        prompts: JSONL to post; None leaves what the run has.
        paused: whether training is left as it is.
        stay: whether the services go on after the last step, until the task is cancelled.
    """
    console = Console(markup=False, highlight=False, soft_wrap=True)
    config = load_config(config_path)
    rows = read_prompts(prompts) if prompts is not None else []
    if rows:
        check_environments(rows)
    async with Supervisor(config, config_path, console.print) as supervisor:
        async with async_store_of(config) as store:
            if rows:
                console.print(f"{len(await store.upsert(rows))} prompts posted")
            if not paused:
                await begin(store)
        console.print(f"the page: {config.value_store.url}/ (REST: {config.value_store.url}/v1/openapi.json)")
        await supervisor.watch(show_until(supervisor, console, lambda: supervisor.learner_completed))
        console.print(f"all {config.run.total_steps} steps are trained; {config.run.dir / 'steps.jsonl'} has them")
        if stay:
            console.print("the services stay up until Ctrl-C")
            await supervisor.watch(asyncio.Event().wait())
