"""Where a run's value store answers, and with which token."""

from __future__ import annotations

from singlestream.clients.value_store import AsyncValueStore, ValueStore
from singlestream.config import Config


def store_url(config: Config) -> str:
    """Address of the run's value store."""
    return f"http://{config.value_store.host}:{config.value_store.port}"


def _token(config: Config) -> str | None:
    token = config.value_store.write_token or config.value_store.read_token
    return token.get_secret_value() if token is not None else None


def store_of(config: Config) -> ValueStore:
    """A blocking client of the run's value store."""
    return ValueStore(store_url(config), _token(config))


def async_store_of(config: Config) -> AsyncValueStore:
    """An asynchronous client of the run's value store."""
    return AsyncValueStore(store_url(config), _token(config))
