"""`singlestream estimate`, `singlestream eval` and `singlestream jobs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from singlestream.cli.values import ConfigOption, JsonOption, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from singlestream.clients.value_store import Job, NewPrompt, ValueStore
    from singlestream.evaluation import Benchmark

app = typer.Typer(help="Estimations and evaluations of the run.", no_args_is_help=True)

StallOption = Annotated[float, typer.Option(min=1.0, help="Give up watching after so many seconds without a result.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many prompts of the split.")]
PromptsOption = Annotated[Path | None, typer.Option(exists=True, help="JSONL of prompts to post first.")]
STALL_S = 3600.0
DATASET_S = 1800.0
"""A data set must be loaded within this, from the hub too."""


def _json_file(path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".json":
        raise typer.BadParameter(f"the recipe's format is JSON: name it {path.name}.json")
    return path


def _share(top_p: float) -> float:
    if not 0.0 < top_p <= 1.0:
        raise typer.BadParameter(f"{top_p} is not in (0, 1]")
    return top_p


@contextmanager
def _store(config: Path) -> Iterator[ValueStore]:
    """The run's value store; a named error ends the command with exit code 1, Ctrl-C with 130."""
    try:
        with open_store(config) as store:
            yield store
    except KeyboardInterrupt:
        typer.echo("the job goes on; the same command watches it again, `singlestream jobs cancel` ends it", err=True)
        raise typer.Exit(130) from None


def _follow(store: ValueStore, job: Job, stall_s: float) -> Job:
    from rich.console import Console

    from singlestream.cli.watch import watch

    console = Console(stderr=True)
    begun = "" if job.done + job.failed == 0 else f", {job.done + job.failed} of {job.total} done before"
    console.print(f"job {job.job_id}: {job.n} rewards for each of {job.prompts} prompts{begun}")
    return watch(store, job, console, stall_s)


def estimate(
    config: ConfigOption,
    split: Annotated[Literal["train", "eval"], typer.Option(help="Prompts of this split.")] = "train",
    n: Annotated[int, typer.Option(min=1, max=1024, help="Rewards for each prompt.")] = 8,
    limit: LimitOption = None,
    prompts: PromptsOption = None,
    export: Annotated[
        Path | None, typer.Option(callback=_json_file, help="Write the reference recipe's offline_values.json here.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Collect anew what has been estimated already.")] = False,
    stall_s: StallOption = STALL_S,
) -> None:
    """Collect rewards for prompts and set their priors. Started again, it goes on with what is there."""
    with _store(config) as store:
        if prompts is not None:
            _post(store, prompts)
        job = store.create_job("estimate", split=split, n=n, limit=limit, resume=not again)
        job = _follow(store, job, stall_s)
        typer.echo(
            f"job {job.job_id}: {job.done} rewards of {job.prompts} prompts, {job.failed} failed, "
            f"mean {job.reward_mean or 0.0:.3f}; the priors of unvisited prompts are set"
        )
        if export is not None:
            store.export_file(export, job.job_id)
            typer.echo(f"{export}: the rewards by prompt")


def _post(store: ValueStore, path: Path) -> list[str]:
    from singlestream.cli.up import read_prompts

    return list(store.upsert(read_prompts(path)))


def evaluate(
    config: ConfigOption,
    datasets: Annotated[
        list[str] | None,
        typer.Argument(help="Data sets by name, from the hub, or NAME=FILE; without any: the posted prompts."),
    ] = None,
    split: Annotated[
        Literal["train", "eval"], typer.Option(help="Posted prompts of this split, where no data set is named.")
    ] = "eval",
    n: Annotated[int, typer.Option(min=1, max=1024, help="Samples of each prompt.")] = 32,
    limit: LimitOption = None,
    environment: Annotated[
        str, typer.Option(help="Of the named data sets; with /grader for another one.")
    ] = "math_python",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(callback=_share, help="In (0, 1]; 1 switches it off.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="0 means no limit.")] = 20,
    pinned: Annotated[bool, typer.Option(help="One policy version samples everything, on replicas of its own.")] = True,
    again: Annotated[bool, typer.Option("--again", help="A job of its own, also where the same is under way.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON to write; default: evaluations/<job>.json of the run.")] = None,
    as_json: JsonOption = False,
    stall_s: StallOption = STALL_S,
) -> None:
    """Evaluate the policy: avg@n, maj@k and pass@k of each benchmark, with 95 % intervals."""
    import json

    from singlestream.config import load_config
    from singlestream.contracts import Sampling
    from singlestream.evaluation import benchmarks, report

    with _store(config) as store:
        rows = [row for name in datasets or [] for row in read_dataset(name, environment)]
        wanted: dict[str, Any] = {"prompt_ids": list(store.upsert(rows))} if rows else {"split": split, "limit": limit}
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        job = store.create_job("evaluate", **wanted, n=n, sampling=sampling, pinned=pinned, resume=not again)
        job = _follow(store, job, stall_s)
        results = list(store.job_results(job.job_id))
        ids = list(dict.fromkeys(result.prompt_id for result in results))
        sources = {one.prompt_id: one.source for one in store.values(ids=ids) if one is not None}
        found = benchmarks(results, sources, job.n)
        told = json.dumps(report(job, found), indent=2)
        path = out or load_config(config).run.dir / "evaluations" / f"{job.job_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told + "\n")
    if as_json:
        typer.echo(told)
    else:
        _show(job, found)
        typer.echo(f"written to {path}")


def read_dataset(name: str, environment: str) -> list[NewPrompt]:
    """Prompts of a data set: ``NAME`` from the hub, or ``NAME=FILE``. Raises `ConfigError` with the reader's words."""
    import subprocess
    import sys
    import tempfile

    from singlestream.cli.up import read_prompts
    from singlestream.errors import ConfigError

    name, _, file = name.partition("=")
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        out = Path(folder) / "prompts.jsonl"
        # a service's own command: this package imports no service
        command = [sys.executable, "-m", "services.rollout.datasets", name, *([file] if file else [])]
        command += ["--out", str(out), "--split", "eval", "--environment", environment]
        try:
            reply = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DATASET_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"data set {name}: not there after {DATASET_S:.0f} s") from None
        if reply.returncode != 0:
            said = reply.stderr.strip().splitlines() or [f"its reader ended with {reply.returncode}"]
            raise ConfigError(f"data set {name}: {said[-1]}")
        return read_prompts(out)


def _show(job: Job, found: Sequence[Benchmark]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    policy = f"policy {job.version}.{job.lineage}" if job.pinned else f"policies {', '.join(map(str, job.versions))}"
    table = Table(title=f"{policy}, {job.n} samples a prompt, in % with 95 % intervals")
    for column in ("benchmark", "prompts", f"avg@{job.n}", f"maj@{job.n}", f"pass@{job.n}", "tokens", "failed"):
        table.add_column(column, justify="left" if column == "benchmark" else "right", overflow="fold")
    for one in found:
        measured = (one.avg, one.maj.get(job.n), one.pass_.get(job.n))
        cells = ["-" if m is None else f"{100 * m.value:.1f}\n{100 * m.low:.3g}–{100 * m.high:.3g}" for m in measured]
        table.add_row(Text(one.name), str(one.prompts), *cells, f"{one.response_tokens_mean:.0f}", str(one.failed))
    if len(found) > 1:
        table.add_row("mean", "", f"{100 * sum(one.avg.value for one in found) / len(found):.1f}")
    Console().print(table)


@app.command(name="list")
def list_(config: ConfigOption, as_json: JsonOption = False) -> None:
    """All jobs, newest first."""
    with _store(config) as store:
        jobs = store.jobs()
    if as_json:
        for job in jobs:
            typer.echo(job.model_dump_json())
        return
    if not jobs:
        typer.echo("no jobs; `singlestream estimate` and `singlestream eval` make them")
    for job in jobs:
        state = job.error or job.waiting_for or job.state
        typer.echo(f"{job.job_id}  {job.purpose}  {job.done} of {job.total}, {job.failed} failed  {state}")


@app.command()
def cancel(
    job_id: Annotated[str, typer.Argument(help="12 hex digits; the first column of `jobs list`.")], config: ConfigOption
) -> None:
    """End a job early; its results so far stay."""
    with _store(config) as store:
        job = store.cancel_job(job_id)
    typer.echo(f"job {job.job_id}: {job.state}, {job.done} of {job.total} done")
