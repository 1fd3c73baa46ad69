"""`singlestream scale`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from singlestream.cli.ending import named_errors
from singlestream.cli.values import ConfigOption

REQUEST_TIMEOUT_S = 30.0


def _at_least_one(replicas: int) -> int:
    if replicas < 1:
        raise typer.BadParameter(
            "at least 1: without a replica nobody would answer the next `singlestream scale`. "
            "`singlestream training paused` stops training, POST /v1/control of the rollout service its replicas."
        )
    return replicas


def scale(
    service: Annotated[Literal["rollout"], typer.Argument(help="What to scale.")],
    replicas: Annotated[int, typer.Argument(max=1024, callback=_at_least_one, help="Most replicas from now on.")],
    config: ConfigOption,
) -> None:
    """Set how many rollout replicas the run may have; training goes on meanwhile."""
    import httpx

    from singlestream.cli.connect import check_run
    from singlestream.config import load_config
    from singlestream.errors import ServiceError

    with named_errors(config):
        settings = load_config(config)
        rollout = settings.rollout
        check_run(rollout, settings.run.name)
        url = f"{rollout.url}/v1/scale"
        headers = {} if rollout.token is None else {"Authorization": f"Bearer {rollout.token.get_secret_value()}"}
        try:
            reply = httpx.put(url, json={"replicas": replicas}, headers=headers, timeout=REQUEST_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise ServiceError("rollout", f"PUT {url}", f"{type(error).__name__}: {error}") from error
        if not reply.is_success:
            raise ServiceError("rollout", f"PUT {url}", f"{reply.status_code} {reply.text[:500]}", reply.status_code)
    typer.echo(f"rollout: at most {replicas} replicas")
