"""The `singlestream` command. Heavy imports stand inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from singlestream.cli import jobs, values
from singlestream.cli.ending import named_errors
from singlestream.cli.scale import scale
from singlestream.cli.status import status, training

app = typer.Typer(
    help="Asynchronous reinforcement learning for language models with Single-stream Policy Optimization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigOption = values.ConfigOption


def run_until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``; Ctrl-C or SIGTERM cancels it, so that it stops its services cleanly, once however often."""

    async def main() -> None:
        task = asyncio.ensure_future(work)

        def stop() -> None:
            if task.cancelling():  # cancelled once more, it would leave services behind
                typer.echo("still stopping the services", err=True)
            else:
                task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        await task

    try:
        with named_errors():
            asyncio.run(main())
    except asyncio.CancelledError:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


def up(
    config: ConfigOption,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of prompts to post: question, answer, source, environment, split.")
    ] = None,
    paused: Annotated[
        bool, typer.Option("--paused", help="Do not start training; `singlestream training running` does.")
    ] = False,
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep the services up after the last step, to look at values or evaluate.")
    ] = False,
) -> None:
    """Start an embedded Redis and all services on this machine, and train until done or Ctrl-C.

    The same command again goes on where the run stopped; to begin anew, delete runs/NAME.
    """
    from singlestream.cli.up import up as work

    run_until_signal(work(config, prompts, paused, stay))


def demo(
    model: Annotated[
        Literal["tiny", "smollm2"], typer.Option(help="`make setup` makes the one, `make demo-smollm2` the other.")
    ] = "tiny",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps instead of the configuration's.")] = None,
) -> None:
    """Train a small model with SPO on this machine, evaluate before and after, and write a report."""
    from singlestream.demo.run import demo as work

    run_until_signal(work(model, steps))


def _hand_over_to(module: str, *arguments: str) -> None:
    """Run a service's own command: this package imports no service."""
    reply = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    raise typer.Exit(reply.returncode)


def check() -> None:
    """Run the canaries on this machine and say what it lacks; exit code 78 where it cannot isolate."""
    _hand_over_to("services.sandbox_gateway.check")


def export(config: ConfigOption, out: Annotated[Path, typer.Argument(help="Folder to make.")]) -> None:
    """Write the newest good checkpoint as a Hugging Face folder that transformers and vLLM load."""
    _hand_over_to("services.learner.export", "--config", str(config), str(out))


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

    with named_errors():
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
    typer.echo(describe(proposal))


sandbox = typer.Typer(help="The sandbox that runs model-written Python.", no_args_is_help=True)
sandbox.command()(check)

PANELS: dict[str, dict[str, Any]] = {
    "Run": {"demo": demo, "up": up, "status": status, "training": training, "scale": scale},
    "Look": {"values": values.app, "ledger": values.ledger},
    "Measure": {"estimate": jobs.estimate, "eval": jobs.evaluate, "jobs": jobs.app},
    "Before and after": {"plan": plan, "sandbox": sandbox, "export": export, "replay": replay},
}
"""Every command, as ``--help`` shows them."""

for panel, commands in PANELS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name=name, rich_help_panel=panel)(command)


if __name__ == "__main__":
    app()
