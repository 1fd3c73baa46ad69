"""`singlestream up`: one machine's services, and a line that says where the run stands."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from singlestream.cli.connect import async_store_of, store_url
from singlestream.clients.value_store import NewPrompt
from singlestream.config import load_config
from singlestream.errors import ConfigError
from singlestream.supervisor.live import show_until
from singlestream.supervisor.supervisor import Supervisor


def read_prompts(path: Path) -> list[NewPrompt]:
    """Prompts of a JSONL file. Raises `ConfigError` that names the line which is no prompt."""
    prompts = []
    for number, line in enumerate(path.read_text().split("\n"), start=1):  # a question may hold U+2028 or U+0085
        try:
            if line.strip():
                prompts.append(NewPrompt.model_validate_json(line))
        except ValidationError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
    return prompts


async def up(config_path: Path, prompts: Path | None, paused: bool) -> None:
    """Start everything, post the prompts, train until all steps are done or the task is cancelled."""
    console = Console()
    config = load_config(config_path)
    rows = read_prompts(prompts) if prompts is not None else []
    async with Supervisor(config, config_path, console.print) as supervisor:
        async with async_store_of(config) as store:
            if rows:
                console.print(f"{len(await store.upsert(rows))} prompts posted")
            if not paused:
                await store.set_training("running")
        console.print(f"the page: {store_url(config)}/ (REST: {store_url(config)}/v1/openapi.json)")
        await supervisor.watch(show_until(supervisor, console, lambda: supervisor.learner_completed))
        console.print(f"all {config.run.total_steps} steps are trained; {config.run.dir / 'steps.jsonl'} has them")
