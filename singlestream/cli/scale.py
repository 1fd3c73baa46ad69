"""`singlestream scale`."""

from __future__ import annotations

from typing import Annotated

import typer

from singlestream.cli.values import ConfigOption

REQUEST_TIMEOUT_S = 30.0


def scale(
    service: Annotated[str, typer.Argument(help="What to scale: rollout.")],
    replicas: Annotated[int, typer.Argument(min=0, max=1024, help="Most replicas from now on.")],
    config: ConfigOption,
) -> None:
    """Set how many rollout replicas the run may have; training goes on meanwhile."""
    import httpx

    from singlestream.config import load_config
    from singlestream.errors import SinglestreamError

    if service != "rollout":
        typer.echo(f"error: only rollout can be scaled, not {service!r}", err=True)
        raise typer.Exit(2)
    try:
        rollout = load_config(config).rollout
    except SinglestreamError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    url = f"http://{rollout.host}:{rollout.port}/v1/scale"
    headers = {} if rollout.token is None else {"Authorization": f"Bearer {rollout.token.get_secret_value()}"}
    try:
        reply = httpx.put(url, json={"replicas": replicas}, headers=headers, timeout=REQUEST_TIMEOUT_S)
        reply.raise_for_status()
    except httpx.HTTPError as error:
        typer.echo(f"error: rollout: PUT {url}: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"rollout: at most {replicas} replicas")
