"""How a command ends that cannot do what it was asked: one line on stderr, exit code 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from singlestream.errors import ServiceError, SinglestreamError


@contextmanager
def named_errors(run: Path | None = None) -> Iterator[None]:
    """Tell named errors, and files that cannot be used, without a traceback.

    Args:
        run: configuration of a run whose services are asked; where none answers, it is said how to start them.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        known, unknown = group.split(SinglestreamError)
        if unknown is not None or known is None:
            raise
        for error in _leaves(known):
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except SinglestreamError as error:
        typer.echo(f"error: {error}", err=True)
        if run is not None and isinstance(error, ServiceError) and error.status is None:
            ask_whether_up(run)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None:  # no file's fault but ours
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(1) from None


def ask_whether_up(run: Path) -> None:
    """Say how a run is started, where nothing of it answers.

    Args:
        run: its configuration.
    """
    typer.echo(f"Is the run up? `singlestream up --stay --config {run}` starts it.", err=True)


def _leaves(group: BaseExceptionGroup[SinglestreamError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
