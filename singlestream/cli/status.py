"""`singlestream status` and `singlestream training`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from singlestream.cli.ending import ask_whether_up, named_errors
from singlestream.cli.values import ConfigOption, open_store

if TYPE_CHECKING:
    from singlestream.config import Config


def status(config: ConfigOption) -> None:
    """Where the run stands: each service, what training waits for, the last step. Exit code 1 if one is not ready."""
    from singlestream.config import load_config

    with named_errors(config):
        waits = asyncio.run(_status(load_config(config))).values()
    if all(waits):
        ask_whether_up(config)
    if any(waits):
        raise typer.Exit(1)


async def _status(config: Config) -> dict[str, str | None]:
    """Print it; returns what each service waits for: None where it is ready, or the run has finished without it."""
    from singlestream.cli.connect import async_store_of
    from singlestream.embedded_redis import EmbeddedRedis
    from singlestream.streams import Keys, connect
    from singlestream.supervisor.services import checks
    from singlestream.supervisor.status import read_queues, read_steps, render, since_step_s

    embedded = EmbeddedRedis(config.run.dir / "redis")
    redis = connect(embedded.url if embedded.socket.exists() else config.run.redis_url)
    try:
        every = checks(config, redis)
        waits = dict(zip(every, await asyncio.gather(*(check() for check in every.values())), strict=True))
        if waits["value_store"] is None:
            async with async_store_of(config) as store:
                now = await store.training()
            if now.state == "finished":
                waits["learner"] = None
            # without Redis the store knows no replica
            told = now.state in ("running", "stopping") and waits["redis"] is None
            reason = f", waits for {now.waiting_for}" if told and now.waiting_for else ""
            typer.echo(f"training: {now.state}{reason}; {now.trained} of {now.total} trajectories trained")
        for name, waiting_for in waits.items():
            log = config.run.dir / "logs" / f"{name}.log"
            see = f"; see {log}" if log.exists() else ""
            typer.echo(f"{name}: {'ready' if waiting_for is None else f'waiting for {waiting_for}{see}'}")
        queues = await read_queues(redis, Keys(config.run.name)) if waits["redis"] is None else None
        path = config.run.dir / "steps.jsonl"
        typer.echo(render(read_steps(path), queues, config.run.total_steps, since_step_s(path)))
    finally:
        await redis.aclose()
    return waits


def training(
    state: Annotated[Literal["running", "paused", "stopped"], typer.Argument(help="stopped cannot be taken back.")],
    config: ConfigOption,
) -> None:
    """Run, pause or stop training."""
    with open_store(config) as store:
        now = store.set_training(state)
    typer.echo(f"training: {now.state}{f', waits for {now.waiting_for}' if now.waiting_for else ''}")
