"""REST over a real Redis, in this process: every route, its errors, its tokens."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Sequence

import httpx
import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from services.value_store import evaluations, routes_prompts
from services.value_store.app import make_app
from services.value_store.prompts import Prompt
from services.value_store.store import Store
from services.value_store.table import Table
from singlestream.errors import Fenced
from singlestream.streams import Keys
from tests.services.value_store.world import World, make_config, settle, wake


def client_of(store: Store) -> httpx.AsyncClient:
    app = make_app(store, store.config.value_store)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


@pytest.fixture
async def store(redis: Redis, keys: Keys) -> Store:
    one = Store(make_config(keys), redis)
    await wake(one)
    return one


@pytest.fixture
async def http(store: Store) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(store) as client:
        yield client


def bodies(count: int, **changes: object) -> list[dict[str, object]]:
    return [{"question": f"What is {i}?", "answer": str(i), "source": "s", **changes} for i in range(count)]


async def put(http: httpx.AsyncClient, prompts: list[dict[str, object]]) -> list[str]:
    reply = await http.post("/v1/prompts", json=prompts)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["ids"])


async def trained(store: Store, redis: Redis, keys: Keys, count: int = 4) -> World:
    world = World(redis, keys)
    await world.start()
    await world.publish(0)
    await settle(store)
    await store.set_training("running")
    assert await store.issue(count) == count
    await world.play(lambda lease: float(int(lease.answer) % 2))
    await world.train()
    await settle(store)
    return world


async def test_upsert_keeps_ids_and_values(http: httpx.AsyncClient, store: Store, redis: Redis, keys: Keys) -> None:
    ids = await put(http, bodies(8))
    await trained(store, redis, keys, 4)
    visited = [one for one in ids if store.memory.table.visits[store.memory.table.row(one)]]
    before = (await http.get(f"/v1/prompts/{visited[0]}")).json()
    assert await put(http, bodies(8, answer="other", prior_rewards=[1.0, 1.0])) == ids
    after = (await http.get(f"/v1/prompts/{visited[0]}")).json()
    assert after["answer"] == "other"
    assert (after["alpha"], after["visits"]) == (before["alpha"], 1)
    [fresh, *_] = [one for one in ids if one not in visited]
    assert (await http.get(f"/v1/prompts/{fresh}")).json()["alpha"] == pytest.approx(8 * 2.5 / 3)


async def test_upsert_takes_lines_too(http: httpx.AsyncClient) -> None:
    prompts, lines = bodies(3000), {"content-type": "application/x-ndjson; charset=utf-8"}
    text = "\n\n".join(json.dumps(one) for one in prompts).encode()
    reply = await http.post("/v1/prompts", content=text + b"\r\n", headers=lines)
    assert reply.status_code == 200, reply.text
    assert reply.json()["ids"] == await put(http, prompts)
    for body in (b'{"question": "q"}', b'{"question"', text + b"\n[]"):
        reply = await http.post("/v1/prompts", content=body, headers=lines)
        assert reply.status_code == 422, reply.text
    assert (await http.post("/v1/prompts", content=text, headers={"content-type": "text/plain"})).status_code == 422


async def test_a_prompt_twice_in_one_upsert(http: httpx.AsyncClient) -> None:
    """Its last text and split count, and the last prior that it was given."""
    for known in (False, True):
        question = f"again {known}"
        one = {"question": question, "answer": "1", "source": "s"}
        if known:
            await put(http, [one])
        [prompt_id, _] = await put(http, [{**one, "prior_rewards": [1.0]}, {**one, "answer": "2", "split": "eval"}])
        found = (await http.get(f"/v1/prompts/{prompt_id}")).json()
        assert (found["answer"], found["split"], found["alpha"]) == ("2", "eval", pytest.approx(8 * 1.5 / 2))
        assert (await http.get("/v1/prompts", params={"q": question, "split": "train"})).json()["prompts"] == []


async def test_a_page_is_of_one_memory(http: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is read anew while a page waits for its texts: rows have other numbers then."""
    await put(http, bodies(5, split="eval"))
    ids = await put(http, bodies(5, source="t"))
    fetch, table = store.fetch_prompts, store.memory.table

    async def fetch_as_memory_is_read_anew(ids: Sequence[str]) -> list[Prompt | None]:
        await wake(store)
        order = [store.memory.table.id(row) for row in range(len(table))]
        rows = [table.row(one) for one in reversed(order)]
        store.memory.table = Table()
        store.memory.table.put(order[::-1], table.records(np.array(rows)))
        return await fetch(ids)

    monkeypatch.setattr(routes_prompts, "SCANNED_AT_A_TIME", 2)
    monkeypatch.setattr(store, "fetch_prompts", fetch_as_memory_is_read_anew)
    for params in ({"source": "t", "q": "what"}, {"split": "train", "q": "what"}):
        found = (await http.get("/v1/prompts", params=params)).json()["prompts"]
        assert sorted(one["prompt_id"] for one in found) == sorted(ids)
        assert {(one["source"], one["split"]) for one in found} == {("t", "train")}


async def test_pages_follow_one_another_whatever_the_order(http: httpx.AsyncClient, store: Store) -> None:
    rewards = [[float(i % 3 == 0)] * (i % 5) or None for i in range(57)]
    prompts = [{**one, "prior_rewards": r} for one, r in zip(bodies(57), rewards, strict=True)]
    ids = await put(http, prompts)
    for order in ("id", "value", "weight", "visits", "n_eff", "updated"):
        for descending in (False, True):
            seen, cursor = [], None
            while True:
                params = {"order": order, "descending": descending, "limit": 10} | (
                    {"cursor": cursor} if cursor else {}
                )
                page = (await http.get("/v1/prompts", params=params)).json()
                seen += page["prompts"]
                if (cursor := page["cursor"]) is None:
                    break
            assert sorted(one["prompt_id"] for one in seen) == sorted(ids)
            if field := {"value": "v_hat", "weight": "weight", "n_eff": "n_eff"}.get(order):
                values = [one[field] for one in seen]
                assert values == sorted(values, reverse=descending)
    assert len({one["weight"] for one in seen}) > 2
    assert all(one["weight"] == pytest.approx((one["v_hat"] * (1 - one["v_hat"])) ** 0.5 + 0.05) for one in seen)


async def test_filters(http: httpx.AsyncClient) -> None:
    await put(http, bodies(30))
    await put(http, bodies(5, source="held out", split="eval", prior_rewards=[1.0] * 8))

    async def found(**params: object) -> list[str]:
        reply = await http.get("/v1/prompts", params={"limit": 100, **params})
        assert reply.status_code == 200, reply.text
        return [one["question"] for one in reply.json()["prompts"]]

    assert len(await found(source="held out")) == 5
    assert len(await found(source="nowhere")) == 0
    assert len(await found(split="train")) == 30
    assert len(await found(v_hat_min=0.9)) == 5
    assert len(await found(n_eff_max=2.0)) == 30
    assert len(await found(visits_min=1)) == 0
    assert sorted(await found(q="WHAT IS 2", source="s")) == sorted(
        ["What is 2?", *[f"What is {i}?" for i in range(20, 30)]]
    )
    reply = await http.get("/v1/prompts", params={"q": "what", "limit": 7})
    assert len(reply.json()["prompts"]) == 7
    assert reply.json()["cursor"]


async def test_values_by_ids_and_by_texts(http: httpx.AsyncClient) -> None:
    ids = await put(http, bodies(3))
    reply = await http.post("/v1/values", json={"ids": [ids[2], "f" * 16, ids[0], ids[2]]})
    assert [one and one["prompt_id"] for one in reply.json()["values"]] == [ids[2], None, ids[0], ids[2]]
    texts = {"texts": ["What is 1?", "what is 1?"]}
    for body in (texts, {**texts, "source": "s"}):
        values = (await http.post("/v1/values", json=body)).json()["values"]
        assert [one and one["prompt_id"] for one in values] == [ids[1], None]
    assert (await http.post("/v1/values", json={**texts, "source": "t"})).json()["values"] == [None, None]
    for bad in ({"ids": [], "texts": []}, {"texts": ["\ud800"]}, {"texts": [], "source": "\ud800"}):
        reply = await http.post("/v1/values", content=json.dumps(bad), headers={"content-type": "application/json"})
        assert reply.status_code == 422, bad


async def test_a_look_up_hashes_no_more_than_its_bound(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("s", "t", "u"):
        await put(http, bodies(1, source=source))
    monkeypatch.setattr(routes_prompts, "HASHED_CHARACTERS", 29)
    for source, status in ((None, 422), ("t", 200)):
        reply = await http.post("/v1/values", json={"texts": ["What is 0?"], "source": source})
        assert reply.status_code == status
    assert "30 characters × sources" in (await http.post("/v1/values", json={"texts": ["What is 0?"]})).text


async def test_history_tells_every_update(http: httpx.AsyncClient, store: Store, redis: Redis, keys: Keys) -> None:
    ids = await put(http, bodies(4))
    world = await trained(store, redis, keys)
    await world.publish(1, z=0.1)
    await settle(store)
    await store.issue(4)
    await world.play(lambda lease: 1.0)
    await world.train()
    await settle(store)
    newest, oldest = (await http.get(f"/v1/prompts/{ids[1]}/history")).json()["entries"]
    assert (newest["version"], oldest["version"]) == (1, 0)
    assert newest["rho"] == pytest.approx(2**-0.1)
    assert newest["v_hat_before"] == oldest["v_hat_after"] == newest["v_hat_at_lease"]
    assert oldest["v_hat_at_lease"] == 0.5
    now = (await http.get(f"/v1/prompts/{ids[1]}")).json()
    assert newest["interval"] == pytest.approx(now["interval"]), "nothing has drifted since"
    assert (newest["z"], newest["reward"], newest["outcome"]) == (0.1, 1.0, "trained")
    assert (await http.get(f"/v1/prompts/{'f' * 16}/history")).status_code == 404


async def test_the_run_at_a_glance(http: httpx.AsyncClient, store: Store, redis: Redis, keys: Keys) -> None:
    await put(http, bodies(8))
    await trained(store, redis, keys)
    training = (await http.get("/v1/training")).json()
    assert (training["state"], training["trained"], training["total"]) == ("running", 4, 200)
    ledger = (await http.get("/v1/ledger")).json()
    assert ledger["train"]["leased"] == ledger["train"]["trained"] == 4
    assert ledger["train"]["adds_up"]
    stats = (await http.get("/v1/stats")).json()
    assert (stats["prompts"], stats["visits"], stats["brier"]) == (8, 4, 0.25)
    assert sum(one["count"] for one in stats["v_hat_histogram"]) == 8
    assert sum(one["count"] for one in stats["n_eff_histogram"]) == 8
    assert [one["count"] for one in stats["reliability"]] == [4]
    assert 0 < stats["sampling_entropy_nats"] <= stats["sampling_entropy_max_nats"]
    policy = (await http.get("/v1/policy")).json()
    assert policy["newest"]["version"] == 0
    preview = (await http.get("/v1/preview", params={"count": 5})).json()["prompts"]
    assert len({one["prompt_id"] for one in preview}) == 5
    store.memory.table.in_flight[:] = 1
    assert (await http.get("/v1/preview")).json() == {"prompts": []}, "all are in flight: nothing to draw"
    store.memory.table.in_flight[:] = 0
    assert (await http.get("/v1/policy?limit=1")).json() == policy
    assert (await http.get("/v1/ledger")).json() == ledger
    metrics = (await http.get("/metrics")).text
    assert 'singlestream_value_store_leased_total{purpose="train"} 4.0' in metrics
    assert "singlestream_value_store_v_hat_bucket" in metrics
    assert (await http.get("/healthz")).json()["status"] == "ok"
    assert (await http.get("/readyz")).json()["epoch"] == store.memory.epoch


async def test_jobs(http: httpx.AsyncClient, store: Store, redis: Redis, keys: Keys) -> None:
    ids = await put(http, bodies(3, split="eval"))
    world = World(redis, keys)
    await world.start()
    reply = await http.post("/v1/jobs", json={"purpose": "evaluate", "split": "eval", "n": 2})
    assert reply.status_code == 201, reply.text
    job = reply.json()
    assert job["sampling"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert (job["total"], job["state"]) == (6, "running")
    await store.issue(4)
    assert (await http.get(f"/v1/jobs/{job['job_id']}")).json()["outstanding"] == 4
    for _ in range(2):
        await world.play(lambda lease: float(int(lease.answer) % 2))
        await settle(store)
        await store.issue(4)
    job = (await http.get(f"/v1/jobs/{job['job_id']}")).json()
    assert (job["state"], job["done"], job["reward_mean"]) == ("finished", 6, pytest.approx(1 / 3))
    assert (job["response_tokens_mean"], job["versions"]) == (4.0, {"0": 6})
    lines = (await http.get(f"/v1/jobs/{job['job_id']}/results")).text.splitlines()
    assert len(lines) == 6
    sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    body = {"purpose": "estimate", "prompt_ids": [ids[0]], "sampling": sampling}
    assert (await http.post("/v1/jobs", json=body)).json()["sampling"] == sampling
    first = (await http.get("/v1/jobs", params={"limit": 1})).json()
    second = (await http.get("/v1/jobs", params={"limit": 1, "cursor": first["cursor"]})).json()
    assert [one["purpose"] for page in (first, second) for one in page["jobs"]] == ["estimate", "evaluate"]
    assert second["cursor"] is None
    assert (await http.get("/v1/jobs")).json() == {"jobs": [*first["jobs"], *second["jobs"]], "cursor": None}
    for bad in ("limit=1001", "cursor=rubbish"):
        assert (await http.get(f"/v1/jobs?{bad}")).status_code == 422
    unknown = await http.post("/v1/jobs", json={"purpose": "estimate", "prompt_ids": ["f" * 16]})
    assert unknown.status_code == 409
    endless = {"prompt_ids": ids, "sampling": {**sampling, "top_k": 10**30}}
    for bad in ({"split": "train"}, {}, {"split": "eval", "prompt_ids": ids}, endless):
        assert (await http.post("/v1/jobs", json={"purpose": "evaluate", **bad})).status_code == 422
    assert (await http.get("/v1/jobs/0123456789ab")).status_code == 404
    assert (await http.post("/v1/jobs/0123456789ab/cancel")).status_code == 404
    assert await evaluations.cancel_job(store, "0123456789ab") is None, "it may have been dropped meanwhile"
    assert store.waiting_for is None, "that puts nothing in doubt"


async def test_training_is_run_paused_and_stopped(http: httpx.AsyncClient) -> None:
    for state in ("running", "paused"):
        assert (await http.put("/v1/training", json={"state": state})).json()["state"] == state
    assert (await http.put("/v1/training", json={"state": "stopped"})).json()["state"] == "stopping"
    reply = await http.put("/v1/training", json={"state": "running"})
    assert reply.status_code == 409
    assert "cannot be taken back" in reply.json()["detail"]
    assert (await http.put("/v1/training", json={"state": "flying"})).status_code == 422


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/v1/prompts/zzz", None, 422, "prompt_id"),
        ("GET", "/v1/prompts/ffffffffffffffff", None, 404, "no prompt"),
        ("GET", "/v1/prompts?limit=1001", None, 422, "the bound is 1000"),
        ("GET", "/v1/prompts?cursor=rubbish", None, 422, "cursor"),
        ("GET", "/v1/prompts?order=size", None, 422, "order"),
        ("GET", "/v1/nowhere", None, 404, "Not Found"),
        ("DELETE", "/v1/prompts", None, 405, "Method Not Allowed"),
        ("POST", "/v1/prompts", [{"question": "q"}], 422, "answer"),
        ("POST", "/v1/prompts", [{"question": "q", "answer": "a", "prior_rewards": [1.5]}], 422, "prior_rewards"),
        ("POST", "/v1/prompts", [{"question": "q", "answer": "a", "colour": "red"}], 422, "colour"),
        ("POST", "/v1/values", {"ids": ["f" * 16] * 10_001}, 422, "the bound is 10000"),
    ],
)
async def test_errors_are_problems(
    http: httpx.AsyncClient, method: str, path: str, body: object, status: int, says: str
) -> None:
    reply = await http.request(method, path, json=body)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["status"] == status
    assert says in problem["detail"]
    assert set(problem) == {"type", "title", "status", "detail"}


async def test_a_store_that_is_not_ready_says_what_it_waits_for(redis: Redis, keys: Keys) -> None:
    store = Store(make_config(keys), redis)
    async with client_of(store) as http:
        assert (await http.get("/healthz")).status_code == 200
        for path in ("/readyz", "/v1/training", "/v1/prompts"):
            reply = await http.get(path)
            assert reply.status_code == 503
            assert "waits for Redis" in reply.json()["detail"]
            assert reply.headers["retry-after"]
        assert "singlestream_value_store_ready 0.0" in (await http.get("/metrics")).text
        await wake(store)
        store.doubt(ConnectionError("gone"))
        assert (await http.get("/v1/training")).status_code == 200  # reading goes on
        assert (await http.post("/v1/prompts", json=bodies(1))).status_code == 503


async def test_only_redis_is_said_to_be_away(
    http: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    [one] = await put(http, bodies(1))
    for error, status, says in (
        (RedisConnectionError("gone"), 503, "Redis is away: gone"),
        (Fenced("another value store has taken over"), 503, "another value store has taken over"),
        (OSError(errno.ENOSPC, "No space left on device"), 500, "the value store failed on this request"),
    ):

        async def fail(ids: Sequence[str], error: Exception = error) -> list[Prompt | None]:
            raise error

        monkeypatch.setattr(store, "fetch_prompts", fail)
        reply = await http.get(f"/v1/prompts/{one}")
        assert reply.status_code == status
        assert reply.json()["detail"].startswith(says)
