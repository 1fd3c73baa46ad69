"""`singlestream values` and `singlestream ledger`.

The value store's answers as tables, or as JSON for other programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from singlestream.cli.ending import named_errors

if TYPE_CHECKING:
    from pydantic import BaseModel

    from singlestream.clients.value_store import PromptValue, ValueStore

app = typer.Typer(help="Prompt values: what the value store believes of each prompt.", no_args_is_help=True)

ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="SINGLESTREAM_CONFIG", help="The run's TOML file.", exists=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
LimitOption = Annotated[int, typer.Option(min=1, max=1000, help="Rows.")]


@contextmanager
def open_store(config: Path) -> Iterator[ValueStore]:
    """The run's value store; a named error ends the command with exit code 1."""
    from singlestream.cli.connect import check_run, store_of
    from singlestream.config import load_config

    with named_errors(config):
        settings = load_config(config)
        check_run(settings.value_store, settings.run.name)
        with store_of(settings) as store:
            yield store


def _json(models: BaseModel | list[BaseModel]) -> None:
    if isinstance(models, list):
        for model in models:
            typer.echo(model.model_dump_json())
    else:
        typer.echo(models.model_dump_json(indent=2))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not str: in that, rich takes what stands in brackets for markup, and questions are full of intervals.
    table = Table(title=Text(title))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _show_prompts(title: str, prompts: list[PromptValue], as_json: bool) -> None:
    if as_json:
        _json(list(prompts))
        return
    if not prompts:
        typer.echo("no prompts")
        return
    rows = [
        [
            prompt.question if len(prompt.question) <= 48 else prompt.question[:47] + "…",
            f"{prompt.weight:.3f}",
            f"{prompt.v_hat:.3f}",
            f"{prompt.interval[0]:.2f}–{prompt.interval[1]:.2f}",
            f"{prompt.n_eff:.1f}",
            str(prompt.visits),
            "-" if prompt.version is None else str(prompt.version),
            prompt.prompt_id,
        ]
        for prompt in prompts
    ]
    _table(title, ["question", "weight", "v̂", "95 %", "n_eff", "visits", "version", "id"], rows)


@app.command()
def top(
    config: ConfigOption,
    order: Annotated[
        Literal["value", "weight", "visits", "n_eff", "updated"],
        typer.Option(help="v̂, the sampler's weight, leases counted, what they are worth now, or the last change."),
    ] = "weight",
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest first.")] = False,
    split: Annotated[Literal["train", "eval"], typer.Option(help="Only train prompts are drawn.")] = "train",
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """Prompts in order, by default those the sampler is most likely to draw."""
    with open_store(config) as store:
        page = store.list(order=order, descending=not ascending, split=split, limit=limit)
    _show_prompts(f"{split} prompts by {order}", page.prompts, as_json)


@app.command()
def search(
    text: Annotated[str, typer.Argument(help="Any part of the question; upper and lower case are alike.")],
    config: ConfigOption,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """Prompts whose question contains a text."""
    with open_store(config) as store:
        found = list(islice(store.iterate(q=text, limit=limit), limit))
    _show_prompts(f"questions with {text!r}", found, as_json)


@app.command()
def show(
    prompt_id: Annotated[str, typer.Argument(help="16 hex digits; the last column of `values top`.")],
    config: ConfigOption,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """One prompt: its posterior and its last updates, newest first."""
    with open_store(config) as store:
        prompt, history = store.get(prompt_id), store.history(prompt_id, limit)
    if as_json:
        updates = [entry.model_dump(mode="json") for entry in history]
        typer.echo(json.dumps({**prompt.model_dump(mode="json"), "updates": updates}, indent=2))
        return
    _show_prompts("posterior", [prompt], as_json)
    rows = [
        [
            entry.lease_id,
            str(entry.version),
            f"{entry.reward:g}",
            f"{entry.rho:.3f}",
            f"{entry.v_hat_before:.3f} → {entry.v_hat_after:.3f}",
            f"{entry.n_eff:.1f}",
        ]
        for entry in history
    ]
    _table("updates", ["lease", "version", "reward", "ρ", "v̂", "n_eff"], rows)


@app.command()
def stats(config: ConfigOption, as_json: JsonOption = False) -> None:
    """The table of prompts at a glance: visits, mean value, sampling entropy, calibration."""
    with open_store(config) as store:
        answer = store.stats()
    if as_json:
        _json(answer)
        return
    facts = {
        "prompts (training)": f"{answer.prompts} ({answer.prompts_train})",
        "visited": str(answer.visited),
        "visits": str(answer.visits),
        "mean v̂": "-" if answer.v_hat_mean is None else f"{answer.v_hat_mean:.3f}",
        "Brier score of v̂ at the lease": "-" if answer.brier is None else f"{answer.brier:.3f}",
        "sampling entropy": f"{answer.sampling_entropy_nats:.2f} of {answer.sampling_entropy_max_nats:.2f} nats",
    }
    _table("values", ["", "value"], [list(fact) for fact in facts.items()])
    rows = [
        [f"{one.v_hat_low:.1f}–{one.v_hat_high:.1f}", str(one.count), f"{one.v_hat_mean:.3f}", f"{one.reward_mean:.3f}"]
        for one in answer.reliability
        if one.count
    ]
    _table("calibration", ["v̂ at the lease", "leases", "mean v̂", "mean reward"], rows)


@app.command(name="import")
def import_(
    config: ConfigOption,
    path: Annotated[Path, typer.Argument(exists=True, help=".ndjson, .jsonl, .parquet, or the recipe's .json.")],
    source: Annotated[
        str | None, typer.Option(help="Of the texts in the recipe's .json; otherwise every source is tried.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Insert prompts, with priors where the file has rewards."""
    with open_store(config) as store:
        answer = store.import_file(path, source)
    if as_json:
        _json(answer)
        return
    names = {"prompts": "prompts inserted or updated", "priors": "of these with a prior", "unknown": "unknown texts"}
    _table(str(path), ["", "number"], [[words, str(getattr(answer, name))] for name, words in names.items()])


@app.command()
def export(
    config: ConfigOption,
    path: Annotated[Path, typer.Argument(help=".ndjson or .parquet: prompts and values; .json: a job's rewards.")],
    job: Annotated[str | None, typer.Option(help="Estimation job, for .json.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write every prompt and its value to a file."""
    with open_store(config) as store:
        store.export_file(path, job)
    size = path.stat().st_size
    typer.echo(json.dumps({"path": str(path), "bytes": size}) if as_json else f"{path}: {size} bytes")


def ledger(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Where every lease is, by purpose."""
    with open_store(config) as store:
        answer = store.ledger()
    if as_json:
        _json(answer)
        return
    purposes = {name: getattr(answer, name) for name in ("train", "estimate", "evaluate")}
    states = ("leased", "outstanding", "trained", "stale", "failed", "scored", "cancelled")
    rows = [[state, *(str(getattr(counts, state)) for counts in purposes.values())] for state in states]
    rows.append(["adds up", *("yes" if counts.adds_up else "NO" for counts in purposes.values())])
    _table(f"ledger, epoch {answer.epoch}, {answer.duplicates} duplicates", ["leases", *purposes], rows)
