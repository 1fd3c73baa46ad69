"""Follow a job of the value store until it ends, with a progress bar."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from singlestream.clients.value_store import Job, ValueStore
from singlestream.errors import DeadlineExceeded, ServiceError, SinglestreamError

POLL_S = 0.5
AWAY_S = 600.0
"""A value store that restarts reads everything anew; longer than this it is gone."""


class JobFailed(SinglestreamError):
    """A job ended before all of its items did; the text says why."""


def _ask(store: ValueStore, job_id: str, away_since_s: float | None) -> tuple[Job | None, float | None]:
    """The job, or None and since when the store is away. Raises `ServiceError` for a refusal or after `AWAY_S`."""
    try:
        return store.job(job_id), None
    except ServiceError as error:
        since_s = away_since_s or time.monotonic()
        if error.status not in (None, 503) or time.monotonic() - since_s > AWAY_S:
            raise
        return None, since_s


def watch(store: ValueStore, job: Job, console: Console, stall_s: float) -> Job:
    """Show the job until it has ended; returns it as it is then.

    Raises:
        JobFailed: it failed or was cancelled.
        DeadlineExceeded: no item ended for ``stall_s``; names what the job waits for. The job itself goes on.
        ServiceError: the value store refuses, or has been away for ten minutes.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    moved_s, before, away_since_s = time.monotonic(), -1, None
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(job.purpose, total=job.total, note="")
        while job.state == "running":
            ended = job.done + job.failed
            progress.update(bar, completed=ended, note=_note(job))
            if ended != before:
                moved_s, before = time.monotonic(), ended
            if time.monotonic() - moved_s > stall_s:
                waits = job.waiting_for or f"{job.outstanding} episodes to end"
                raise DeadlineExceeded(f"job {job.job_id}, {ended} of {job.total} done, for {waits}", stall_s)
            time.sleep(POLL_S)
            found, away_since_s = _ask(store, job.job_id, away_since_s)
            job = found or job
            if found is None:
                progress.update(bar, note="the value store does not answer")
        progress.update(bar, completed=job.done + job.failed, note=_note(job))
    if job.state == "failed":
        raise JobFailed(f"job {job.job_id}: {job.error}; {job.done} of {job.total} results are kept")
    return job


def _note(job: Job) -> str:
    if job.waiting_for is not None:
        return f"waits for {job.waiting_for}"
    mean = "" if job.reward_mean is None else f"mean reward {job.reward_mean:.3f}"
    return mean + (f", {job.failed} failed" if job.failed else "")
