"""Who is answered: tokens, and where none is asked for, only this machine's own pages and programs."""

# ruff: noqa: F811  the fixtures are test_rest's
from __future__ import annotations

import json

import httpx
import pytest
from redis.asyncio import Redis

from services.value_store.app import make_app
from services.value_store.store import Store
from singlestream.errors import ConfigError
from singlestream.streams import Keys
from tests.services.value_store.test_rest import bodies, client_of, http, store  # noqa: F401
from tests.services.value_store.world import make_config, wake


async def test_tokens(redis: Redis, keys: Keys) -> None:
    tokens = {"read_token": "r", "write_token": "w", "host": "0.0.0.0"}  # noqa: S104
    store = Store(make_config(keys, value_store=tokens), redis)
    await wake(store)
    async with client_of(store) as http:

        async def status(method: str, path: str, token: str | None) -> int:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return (
                await http.request(method, path, json=[] if method == "POST" else None, headers=headers)
            ).status_code

        assert [await status("GET", "/v1/training", token) for token in (None, "x", "r", "w")] == [401, 403, 200, 200]
        assert [await status("POST", "/v1/prompts", token) for token in (None, "x", "r", "w")] == [401, 403, 403, 200]
        assert [await status("GET", "/metrics", token) for token in (None, "r")] == [401, 200]
        assert [await status("GET", path, None) for path in ("/healthz", "/readyz")] == [200, 200]


async def test_off_loopback_without_tokens_is_refused(redis: Redis, keys: Keys) -> None:
    for tokens in ({}, {"read_token": "r"}, {"write_token": "w"}):
        store = Store(make_config(keys, value_store={"host": "10.0.0.1", **tokens}), redis)
        with pytest.raises(ConfigError, match="must be set"):
            make_app(store, store.config.value_store)
    store = Store(make_config(keys, value_store={"read_token": "r"}), redis)
    with pytest.raises(ConfigError, match="anyone could write"):
        make_app(store, store.config.value_store)


async def test_a_foreign_host_name_is_refused_where_no_token_is_asked_for(http: httpx.AsyncClient) -> None:
    for host, status in (("evil.example", 400), ("[::1", 400), ("", 400), ("localhost:81", 200), ("[::1]:81", 200)):
        reply = await http.get("/v1/training", headers={"Host": host})
        assert reply.status_code == status, host
    assert "loopback name" in (await http.get("/v1/training", headers={"Host": "evil.example"})).json()["detail"]


async def test_a_write_token_alone_leaves_reading_to_loopback_names(redis: Redis, keys: Keys) -> None:
    store = Store(make_config(keys, value_store={"write_token": "w"}), redis)
    await wake(store)
    async with client_of(store) as http:
        assert (await http.get("/v1/training")).status_code == 200
        assert (await http.get("/v1/training", headers={"Host": "evil.example"})).status_code == 400
        assert (await http.post("/v1/prompts", json=bodies(1))).status_code == 401


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Origin": "http://[::1"}, 403),
        ("POST", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("PUT", {"Origin": "http://evil.example"}, 403),
        ("GET", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Origin": "http://127.0.0.1:8100", "Sec-Fetch-Site": "same-origin"}, 200),
        ("POST", {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"}, 200),
        ("GET", {"Sec-Fetch-Site": "cross-site"}, 200),
    ],
)
async def test_another_sites_page_writes_nothing(
    http: httpx.AsyncClient, store: Store, method: str, headers: dict[str, str], status: int
) -> None:
    """A browser sends a page's plain request anywhere, without asking first; it only keeps the answer from the page."""
    path = {"POST": "/v1/import?format=ndjson", "PUT": "/v1/training", "GET": "/"}[method]
    line = json.dumps(bodies(1)[0]).encode() if method == "POST" else b""
    reply = await http.request(method, path, content=line, headers={"Content-Type": "text/plain", **headers})
    assert reply.status_code == status, reply.text
    assert len(store.memory.table) == (1 if method == "POST" and status == 200 else 0)
    assert status == 200 or "another site's page" in reply.json()["detail"]
