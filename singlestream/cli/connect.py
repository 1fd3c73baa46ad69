"""Where a run's services answer, with which token, and that they are this run's."""

from __future__ import annotations

import httpx

from singlestream.clients.value_store import AsyncValueStore, ValueStore
from singlestream.config import Config, Listening
from singlestream.errors import ConfigError

ASK_S = 10.0


def check_run(service: Listening, run: str) -> None:
    """Raise `ConfigError` if what answers there serves another run: stopping that one could not be taken back.

    A service that does not answer, or is not ready, is left to the request that follows.
    """
    try:
        reply = httpx.get(f"{service.url}/readyz", timeout=ASK_S, trust_env=False)
        served = reply.json().get("run", run) if reply.is_success else run
    except (httpx.HTTPError, ValueError):
        return
    if served != run:
        raise ConfigError(f"{service.url} serves run {served!r}, not {run!r}: each of two runs needs its own ports")


def _token(config: Config) -> str | None:
    token = config.value_store.write_token or config.value_store.read_token
    return token.get_secret_value() if token is not None else None


def store_of(config: Config) -> ValueStore:
    """A blocking client of the run's value store."""
    return ValueStore(config.value_store.url, _token(config))


def async_store_of(config: Config) -> AsyncValueStore:
    """An asynchronous client of the run's value store."""
    return AsyncValueStore(config.value_store.url, _token(config))
