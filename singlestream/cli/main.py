"""The `singlestream` command. Heavy imports stand inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from singlestream.cli import jobs, values
from singlestream.cli.scale import scale
from singlestream.errors import SinglestreamError

app = typer.Typer(
    help="Asynchronous reinforcement learning for language models with Single-stream Policy Optimization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(values.app, name="values")
app.command()(values.ledger)
app.add_typer(jobs.app, name="jobs")
app.command()(jobs.estimate)
app.command(name="eval")(jobs.evaluate)
app.command()(scale)

sandbox = typer.Typer(help="The sandbox that runs model-written Python.", no_args_is_help=True)
app.add_typer(sandbox, name="sandbox")

ConfigOption = values.ConfigOption


def run_until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``; Ctrl-C or SIGTERM cancels it, so that it stops its services cleanly. Exits 1 on a named error."""

    async def main() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        await task

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    except BaseExceptionGroup as group:
        known, unknown = group.split(SinglestreamError)
        if unknown is not None or known is None:
            raise
        for error in _leaves(known):
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except SinglestreamError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _leaves(group: BaseExceptionGroup[SinglestreamError]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


@app.command()
def up(
    config: ConfigOption,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of prompts to post: question, answer, source, environment, split.")
    ] = None,
    paused: Annotated[bool, typer.Option(help="Leave training paused; PUT /v1/training starts it.")] = False,
) -> None:
    """Start an embedded Redis and all services on this machine, and train until done or Ctrl-C."""
    from singlestream.cli.up import up as work

    run_until_signal(work(config, prompts, paused))


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="tiny or smollm2; `make setup` or `make demo-smollm2` makes it.")] = "tiny",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps instead of the configuration's.")] = None,
) -> None:
    """Train a small model with SPO on this machine, evaluate before and after, and write a report."""
    from singlestream.demo.run import demo as work

    run_until_signal(work(model, steps))


def _hand_over_to(module: str, *arguments: str) -> None:
    """Run a service's own command: this package imports no service."""
    reply = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    raise typer.Exit(reply.returncode)


@sandbox.command()
def check() -> None:
    """Run the canaries on this machine and say what it lacks; exit code 78 where it cannot isolate."""
    _hand_over_to("services.sandbox_gateway.check")


@app.command()
def export(config: ConfigOption, out: Annotated[Path, typer.Argument(help="Folder to make.")]) -> None:
    """Write the newest good checkpoint as a Hugging Face folder that transformers and vLLM load."""
    _hand_over_to("services.learner.export", "--config", str(config), str(out))


@app.command()
def replay(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/demo.")],
    json: Annotated[Path | None, typer.Option(help="Write everything to this file too.")] = None,
    prior_observations: Annotated[
        float | None, typer.Option(help="Weight of the priors: 8 as estimated, which is assumed; 1 without estimation.")
    ] = None,
) -> None:
    """Replay every retention mode and shrinkage of v-hat on the evidence of finished runs, offline."""
    options = [] if json is None else ["--json", str(json)]
    options += [] if prior_observations is None else ["--prior-observations", str(prior_observations)]
    _hand_over_to("services.value_store.replay", *map(str, runs), *options)


@app.command()
def plan(
    parameters: Annotated[float, typer.Option(help="Parameters of the model, for example 8.2e9.")],
    gpus: Annotated[int, typer.Option(min=2, help="GPUs in all.")],
    mean_response_tokens: Annotated[float, typer.Option(help="Sampled tokens of a trajectory, on average.")],
    train_batch_size: Annotated[int, typer.Option(help="Trajectories of one optimizer step.")] = 256,
    micro_batch_tokens: Annotated[int, typer.Option(help="learner.micro_batch_tokens.")] = 16_384,
    gpu_memory_gib: Annotated[float, typer.Option(help="Memory of one GPU.")] = 80.0,
    rollout_tokens_per_s: Annotated[float | None, typer.Option(help="Measured, sampled by one GPU.")] = None,
    learner_tokens_per_s: Annotated[float | None, typer.Option(help="Measured, trained by one GPU.")] = None,
    network_gbit_per_s: Annotated[float | None, typer.Option(help="Between machines, where there are several.")] = None,
) -> None:
    """Propose a split of GPUs between rollouts and learner, with the expected idle shares and what they assume."""
    from singlestream.plan import describe
    from singlestream.plan import plan as propose

    try:
        proposal = propose(
            parameters,
            gpus,
            mean_response_tokens,
            train_batch_size,
            micro_batch_tokens,
            gpu_memory_gib,
            rollout_tokens_per_s,
            learner_tokens_per_s,
            network_gbit_per_s=network_gbit_per_s,
        )
    except SinglestreamError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(describe(proposal))


if __name__ == "__main__":
    app()
