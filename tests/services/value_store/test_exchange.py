"""Import and export over REST and a real Redis, and the bounds on requests."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from services.value_store import exchange, routes_exchange
from services.value_store.bounds import RateLimit
from services.value_store.store import Store
from singlestream.streams import Keys
from tests.services.value_store.test_rest import bodies, client_of, put, store, trained  # noqa: F401  a fixture
from tests.services.value_store.world import World, make_config, settle, wake


@pytest.fixture
async def http(store: Store) -> AsyncIterator[httpx.AsyncClient]:  # noqa: F811
    async with client_of(store) as client:
        yield client


async def load(http: httpx.AsyncClient, body: bytes, format: str, **params: str) -> httpx.Response:
    return await http.post("/v1/import", params={"format": format, **params}, content=body)


@pytest.mark.parametrize("format", ["ndjson", "parquet"])
async def test_an_export_is_an_import(
    http: httpx.AsyncClient,
    store: Store,  # noqa: F811
    redis: Redis,
    keys: Keys,
    format: str,
) -> None:
    await put(http, [{**one, "prior_rewards": [1.0, 0.0, 1.0]} for one in bodies(2500)])
    await trained(store, redis, keys, 4)
    body = (await http.get("/v1/export", params={"format": format})).content
    other = Store(make_config(Keys(f"{keys.run}-other")), redis)
    await wake(other)
    async with client_of(other) as second:
        reply = await load(second, body, format)
        assert reply.json() == {"prompts": 2500, "priors": 2500, "unknown": 0}
        params = {"limit": 1000, "order": "id"}
        mine, theirs = [(await one.get("/v1/prompts", params=params)).json()["prompts"] for one in (http, second)]
        same = ("prompt_id", "question", "answer", "source", "environment", "split", "alpha", "beta", "v_hat")
        assert [[one[name] for name in same] for one in mine] == [[one[name] for name in same] for one in theirs]
        assert {one["visits"] for one in theirs} == {0}
        again = (await load(second, body, format)).json()
        assert again["prompts"] == 2500
        assert (await second.get("/v1/stats")).json()["prompts"] == 2500


async def test_an_import_leaves_values_that_were_learned(
    http: httpx.AsyncClient,
    store: Store,  # noqa: F811
    redis: Redis,
    keys: Keys,
) -> None:
    await put(http, bodies(4))
    await trained(store, redis, keys, 4)
    before = store.memory.table.alpha.tolist()
    lines = "\n".join(json.dumps({**one, "alpha": 7.0, "beta": 1.0}) for one in bodies(5))
    assert (await load(http, lines.encode(), "ndjson")).json()["prompts"] == 5
    assert store.memory.table.alpha.tolist() == [*before, 7.0]


async def test_offline_values_of_the_recipe_both_ways(
    http: httpx.AsyncClient,
    store: Store,  # noqa: F811
    redis: Redis,
    keys: Keys,
) -> None:
    ids = await put(http, bodies(4))
    recipe = {"What is 0?": [1, 1, 0, -1], "What is 1?": [0.0] * 8, "nobody asked": [1], "What is 2?": []}
    reply = await load(http, json.dumps(recipe).encode(), "offline_values")
    assert reply.json() == {"prompts": 3, "priors": 3, "unknown": 1}
    values = (await http.post("/v1/values", json={"ids": ids})).json()["values"]
    expected = [8 * 2.5 / 5, 8 * 0.5 / 9, 0.5, 0.5]  # a score above 0 is a success; N0 (s+½)/(n+1)
    assert [one["alpha"] for one in values] == pytest.approx(expected)
    assert (await load(http, json.dumps(recipe).encode(), "offline_values", source="other")).json()["unknown"] == 4
    world = World(redis, keys)
    await world.start()
    job = (await http.post("/v1/jobs", json={"purpose": "estimate", "prompt_ids": ids[:2], "n": 2})).json()["job_id"]
    await store.issue(10)
    await world.play(lambda lease: float(int(lease.answer)))
    await settle(store)
    reply = await http.get("/v1/export", params={"format": "offline_values", "job": job})
    assert reply.json() == {"What is 0?": [0.0, 0.0], "What is 1?": [1.0, 1.0]}
    assert (await http.get("/v1/export", params={"format": "offline_values"})).status_code == 422
    missing = await http.get("/v1/export", params={"format": "offline_values", "job": "0123456789ab"})
    assert missing.status_code == 404


async def test_rewards_of_one_question_in_two_sources_are_one_key(
    http: httpx.AsyncClient,
    store: Store,  # noqa: F811
    redis: Redis,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = [one for source in ("s", "t") for one in await put(http, bodies(3, source=source))]
    world = World(redis, keys)
    await world.start()
    job = (await http.post("/v1/jobs", json={"purpose": "estimate", "prompt_ids": ids[:5], "n": 3})).json()["job_id"]
    await store.issue(100)
    await world.play(lambda lease: float(int(lease.answer) == 1))
    await settle(store)
    asked: list[int] = []
    hmget = redis.hmget

    async def counting(key: str, fields: list[str]) -> object:
        asked.append(len(fields))
        return await hmget(key, fields)

    monkeypatch.setattr(redis, "hmget", counting)
    for most in (7, 2):  # two prompts at a time; fewer results than a prompt has
        monkeypatch.setattr(routes_exchange, "ROWS_AT_A_TIME", most)
        asked.clear()
        reply = await http.get("/v1/export", params={"format": "offline_values", "job": job})
        pairs = json.loads(reply.content, object_pairs_hook=list)
        assert sorted(pairs) == [("What is 0?", [0.0] * 6), ("What is 1?", [1.0] * 6), ("What is 2?", [0.0] * 3)]
        assert max(asked) <= max(most, 3)


def parquet(rows: list[dict[str, object]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def parquet_with_bad_text() -> bytes:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff\xfe"]).buffers()[1:]])
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": bad, "answer": ["a"]}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("format", "body", "says"),
    [
        ("ndjson", b'{"question": "q", "answer": "a"}\n\nrubbish', "line 3: not JSON"),
        ("ndjson", b"[1]", "line 1: expected an object"),
        ("ndjson", b'{"question": "q"}', "line 1: answer: Field required"),
        ("ndjson", b'{"question": "q", "answer": "a", "alpha": -1}', "line 1: alpha"),
        ("ndjson", b'{"question": "q", "answer": "a", "prior_rewards": [2]}', "line 1: prior_rewards"),
        ("ndjson", b"[" * 200_000, "line 1: not JSON"),
        ("ndjson", b" " * (9 * 1024 * 1024), "longer than the bound of 8388608 bytes"),
        ("parquet", b"rubbish", "not a Parquet file"),
        ("parquet", parquet([{"question": "q", "answer": "a"}, {"question": "", "answer": "a"}]), "row 2: question"),
        ("parquet", parquet_with_bad_text(), "not a Parquet file that can be read: 'utf-8' codec"),
        ("offline_values", b"[1]", "expected an object"),
        ("offline_values", b'{"q":' + b"[" * 2_000_000, "prompt 1 ('q'): expected a list of finite scores"),
        ("offline_values", b'{"q": [1], "r": [1, {"s": 1}]}', "prompt 2 ('r'): expected a list of finite scores"),
        ("offline_values", b'{"' + b"q" * (17 * 1024 * 1024), "prompt 1 is longer than the bound of 16777216 bytes"),
        ("offline_values", b"{}", "with at least one prompt"),
        ("offline_values", b"{rubbish", "not JSON"),
        ("offline_values", b'{"q": [1', "not JSON"),
        ("offline_values", b'{"q": 1}', "prompt 1 ('q'): expected a list of finite scores"),
        ("offline_values", b'{"q": [true]}', "expected a list of finite scores"),
    ],
)
async def test_a_bad_import_names_the_place(http: httpx.AsyncClient, format: str, body: bytes, says: str) -> None:
    reply = await load(http, body, format)
    assert reply.status_code == 422
    assert says in reply.json()["detail"]
    assert "before it have been imported" in reply.json()["detail"]


async def test_long_prompts_come_fewer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "STRETCH_BYTES", 25_000)
    rows: list[dict[str, object]] = [{"question": f"{i} " + "x" * 10_000, "answer": "a"} for i in range(7)]

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 4000):
            yield body[start : start + 4000]

    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert [len(part) async for part in exchange.read_ndjson(chunks(lines))] == [3, 3, 1]
    recipe = json.dumps({str(row["question"]): [1] for row in rows}).encode()
    assert max([len(part) async for part in exchange.read_offline_values(chunks(recipe))]) <= 3
    path = tmp_path / "long.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none")
    assert [len(part) for part in exchange.read_parquet(path)] == [2, 2, 2, 1]


async def test_an_import_that_cannot_be_kept_says_where(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk, or a small one in memory, would
    try:
        reply = await load(http, b"x" * 300_000, "parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, hard))
    assert reply.status_code == 413
    assert f"cannot be kept in {tmp_path} while it is read (File too large)" in reply.json()["detail"]
    assert "TMPDIR" in reply.json()["detail"]
    assert os.listdir(tmp_path) == []
    assert (await load(http, parquet([{"question": "q", "answer": "a"}]), "parquet")).status_code == 200


async def test_bodies_are_bounded(redis: Redis, keys: Keys) -> None:
    bounds = {"max_request_bytes": 2000, "max_import_bytes": 3000}
    one = Store(make_config(keys, value_store=bounds), redis)
    await wake(one)
    async with client_of(one) as http:

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b" " * 100

        json_type = {"Content-Type": "application/json"}
        for reply in (
            await http.post("/v1/prompts", content=b" " * 2001, headers=json_type),
            await http.post("/v1/prompts", content=chunks(), headers=json_type),
        ):
            assert reply.status_code == 413
            assert "bound of 2000 bytes" in reply.json()["detail"]
        reply = await load(http, b" " * 3001, "ndjson")
        assert reply.status_code == 413
        assert "bound of 3000 bytes" in reply.json()["detail"]
        assert (await load(http, b"\n" * 2999, "ndjson")).status_code == 200


async def test_rates_are_bounded(redis: Redis, keys: Keys) -> None:
    one = Store(make_config(keys, value_store={"max_requests_per_s": 2.0}), redis)
    await wake(one)
    async with client_of(one) as http:
        replies = [await http.get("/v1/training") for _ in range(6)]
        assert [reply.status_code for reply in replies][:4] == [200] * 4
        assert replies[-1].status_code == 429
        assert "more than 2 requests a second" in replies[-1].json()["detail"]
        assert int(replies[-1].headers["retry-after"]) >= 1
        assert (await http.get("/healthz")).status_code == 200


@given(st.lists(st.floats(0.0, 0.3), min_size=1, max_size=200))
def test_no_more_pass_than_burst_and_rate_allow(gaps: list[float]) -> None:
    limit, now_s, passed = RateLimit(per_s=5.0, burst=3.0), 0.0, 0
    for gap in gaps:
        now_s += gap
        passed += limit.take("a", now_s) == 0.0
    assert passed <= 3 + math.floor(5.0 * now_s + 1e-6)
    assert limit.take("b", now_s) == 0.0
