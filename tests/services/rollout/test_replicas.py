"""Replicas under Ray Serve with real engines: killed, frozen, scaled away, drained, stopped; every lease ends once."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import openai
import psutil
import pytest
import pytest_asyncio

from singlestream.contracts import Lease, Trajectory, decode
from singlestream.streams import GROUP
from tests.services.rollout.service import RESPONSE_TOKENS, SLOTS, START_S, Service, running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

MANY = 80
"""Leases for many rounds of all slots: whenever a replica is touched, it has some in its hands."""
LEASE_TIMEOUT_S = 10.0
"""Longer than a busy machine lets a replica stand still: only the one that the test stops loses its leases."""
SETTLE_S = 60.0
TRIES = 5
"""A replica's episodes start and end together, so all may have just begun, without a token to hand over."""
FEW = "an orderly hand-over counts no attempt; a machine that stands still for the short time-out may, for some"


def pid_of(replica: str) -> int:
    """A replica's name holds its process number."""
    return int(replica.rsplit("-", 2)[1])


def both_busy(told: dict[str, dict[str, Any]], replicas: set[str]) -> bool:
    return all(name in told and told[name]["in_use"] for name in replicas)


def engine_processes(replica: str) -> list[psutil.Process]:
    return psutil.Process(pid_of(replica)).children(recursive=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("replicas")
    # so many attempts: a replica that is slow on a busy machine may lose a lease more than once
    # and so much patience of Serve's: it would replace the one that the test stops
    patience = {"lease_timeout_s": LEASE_TIMEOUT_S, "max_attempts": 50, "engine_timeout_s": START_S}
    async with running(folder, replicas=1, max_replicas=2, **patience) as one:
        yield one


async def test_a_second_replica_joins_and_loads_the_newest_weights_first(service: Service) -> None:
    [alone] = await service.until(lambda told: told, 1, "replicas")
    await service.add(4, 0)
    await service.ended(4)
    await service.publish(2, 1)
    assert [one["paused"] for one in await service.control("pause")] == [True]
    await service.scale(2)
    [joined] = await service.until(lambda told: set(told) - {alone}, 1, "new replicas")
    same = "the same for all"
    await service.add(12, 1, same)
    assert (await service.reports())[joined]["paused"]
    assert await service.redis.xlen(service.keys.leases("train")) == 12
    await service.told("resume", {alone, joined})
    await service.feed(1, lambda told: both_busy(told, {alone, joined}), "episodes in both", same)
    ended = (await service.ended(service.leases))[4:]
    assert {s.replica for one in ended for s in one.segments[1:]} == {alone, joined}
    assert {s.version for one in ended for s in one.segments[1:]} == {1}
    # each replica samples with a seed of its own
    assert len({tuple(one.segments[1].token_ids.tolist()) for one in ended}) == len(ended)


async def freeze(service: Service, replica: str) -> tuple[list[psutil.Process], set[str]]:
    """Stop a replica and its engine while it holds leases; returns their processes, its own last, and its entries."""
    processes = [*engine_processes(replica), psutil.Process(pid_of(replica))]
    started = time.monotonic()
    while True:
        for process in reversed(processes):
            process.suspend()
        if entries := await pending(service, replica):
            return processes, entries
        for process in processes:
            process.resume()  # between two leases
        assert time.monotonic() - started < START_S, f"{replica} holds no lease"
        await asyncio.sleep(0.1)


async def pending(service: Service, replica: str) -> set[str]:
    """Entries of the leases that are a replica's."""
    stream = service.keys.leases("train")
    told = await service.redis.xpending_range(stream, GROUP, "-", "+", 100, consumername=replica)
    return {one["message_id"].decode() for one in told}


async def holds_none(service: Service, replica: str) -> bool:
    return not await pending(service, replica)


async def leases_lost(service: Service) -> float:
    """The most that one of the replicas says it has lost."""
    lost = 0.0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
        for session in map(str, range(12)):
            told = (await client.get("/metrics", headers={"X-Session-Id": session})).text
            counts = re.findall(r"^singlestream_rollout_lost_total (\S+)", told, re.MULTILINE)
            lost = max([lost, *map(float, counts)])
    return lost


async def until(condition: Callable[[], Awaitable[Any]], what: str) -> None:
    started = time.monotonic()
    while not await condition():
        assert time.monotonic() - started < START_S, f"waited for {what}"
        await asyncio.sleep(0.2)


async def test_a_frozen_and_a_killed_replica_lose_no_lease(service: Service) -> None:
    before = await service.redis.xlen(service.keys.trajectories)
    first, _ = await service.add(MANY, 1)
    frozen, living = sorted(await service.busy(2))

    # the other claims what the frozen one holds; when it goes on it finds its leases gone, and changes nothing
    processes, entries = await freeze(service, frozen)
    live = await service.redis.hgetall(service.keys.live)
    taken = {number.decode() for number, entry in live.items() if entry.decode() in entries}
    await until(lambda: holds_none(service, frozen), "the frozen replica's leases to be claimed")
    processes[-1].resume()
    await until(lambda: leases_lost(service), "the continued replica to find its leases gone")
    for process in processes:
        process.resume()

    await service.feed(1, lambda told: both_busy(told, {frozen, living}), "episodes in both again")
    children = engine_processes(living)
    assert len(children) >= 2
    os.kill(pid_of(living), signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 60)
    assert not alive, f"the engine outlived its replica: {alive}"
    await service.redis.hdel(service.keys.replicas, living)

    ended = (await service.ended(before + service.leases + 1 - first))[before:]
    expected = range(first, service.leases + 1)
    assert Counter(one.lease_id for one in ended) == Counter(f"train:0000abcd:{n}" for n in expected)
    assert min(one.attempts for one in ended if one.lease_id in taken) >= 2
    assert await service.redis.hlen(service.keys.live) == 0
    await service.until(lambda told: set(told) - {frozen, living}, 1, "new replicas, from Serve")


async def node_joins_and_leaves(service: Service) -> tuple[str, list[Trajectory]]:
    """A node joins, works and is stopped; returns its replica and what has ended from its first lease on."""
    before = await service.redis.xlen(service.keys.trajectories)
    [address] = re.findall(r"nodes join it at (\S+)", (service.folder / "log").read_text())
    # the service's Ray asks for its token, which lies in the user's home
    environment = {"SINGLESTREAM_ROLLOUT__RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    node = service.start("node.log", "services.rollout", "--node", **environment)
    try:
        await service.scale(3)
        here = socket.gethostname()
        [guest] = await service.until(
            lambda told: [name for name, report in told.items() if report["node"] != here],
            1,
            "replicas on the new node",
        )
        first = service.leases + 1
        await service.feed(0, lambda told: told[guest]["in_use"], "episodes on the new node")
        node.send_signal(signal.SIGTERM)
        await service.feed(0, lambda told: guest not in told, "its hand-over, while all are busy")
        ended = (await service.ended(service.leases))[before:]
        assert await asyncio.to_thread(node.wait, 180) == 0
    finally:
        node.kill()
        node.wait()
        print((service.folder / "node.log").read_text())
    expected = range(first, service.leases + 1)
    assert Counter(one.lease_id for one in ended) == Counter(f"train:0000abcd:{n}" for n in expected)
    assert await service.redis.hlen(service.keys.draining) == 0
    return guest, ended


async def test_a_node_joins_and_hands_over_before_it_leaves(service: Service) -> None:
    await service.until(lambda told: told, 1, "replicas")
    for _ in range(TRIES):
        guest, ended = await node_joins_and_leaves(service)
        if carried := [one for one in ended if {s.replica for s in one.segments[1:]} > {guest}]:
            break
    assert carried
    assert all(sum(len(s.token_ids) for s in one.segments[1:]) == RESPONSE_TOKENS for one in carried)
    assert min(one.attempts for one in carried) == 1, FEW


async def test_a_session_stays_with_its_replica(service: Service) -> None:
    await service.until(lambda told: told, 2, "replicas")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
        started = time.monotonic()
        while True:
            answered: dict[str, set[str]] = {}
            for _ in range(5):
                for session in map(str, range(12)):
                    reply = await client.get("/healthz", headers={"X-Session-Id": session})
                    answered.setdefault(session, set()).add(reply.json()["replica"])
            if all(len(one) == 1 for one in answered.values()) and len(set.union(*answered.values())) == 2:
                break
            assert time.monotonic() - started < SETTLE_S, answered  # Serve may still be learning who there is


async def test_every_replica_hears_the_operator(service: Service) -> None:
    both = set(await service.until(lambda told: told, 2, "replicas"))
    before = await service.redis.xlen(service.keys.trajectories)
    told = await service.told("pause", both)
    assert all(one["paused"] for one in told)
    await asyncio.sleep(1.5)  # a take that was under way has ended
    await service.add(4, 0)
    await asyncio.sleep(1.5)
    assert await service.redis.xlen(service.keys.trajectories) == before
    await service.until(lambda told: [one for one in told.values() if not one["in_use"]], 2, "idle replicas")
    assert not any(one["paused"] for one in await service.control("resume"))
    await service.ended(before + 4)
    assert {one["version"] for one in await service.control("refresh")} == {1}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
        assert (await client.post("/v1/control", json={"action": "explode"})).status_code == 422


async def scaled_away(service: Service) -> tuple[set[str], list[Trajectory]]:
    """One of two replicas is scaled away while both are busy; returns the two and what has ended from then on."""
    await service.scale(2)
    pair = set(await service.until(lambda told: told, 2, "replicas"))
    before = await service.redis.xlen(service.keys.trajectories)
    first = service.leases + 1
    await service.feed(1, lambda told: both_busy(told, pair), "episodes in both")
    scaling = asyncio.create_task(service.scale(1))
    await service.feed(1, lambda told: len(told) == 1, "the hand-over of one, while both are busy")
    await scaling
    ended = (await service.ended(service.leases))[before:]
    expected = range(first, service.leases + 1)
    assert Counter(one.lease_id for one in ended) == Counter(f"train:0000abcd:{n}" for n in expected)
    return pair, ended


async def test_a_replica_that_is_scaled_away_hands_over(service: Service) -> None:
    for _ in range(TRIES):
        pair, ended = await scaled_away(service)
        # what one had sampled stands there, and the other went on from those tokens
        if carried := [one for one in ended if len({s.replica for s in one.segments[1:]}) > 1]:
            break
    assert carried
    for one in carried:
        assert {s.replica for s in one.segments[1:]} == pair
        assert sum(len(s.token_ids) for s in one.segments[1:]) == RESPONSE_TOKENS
    assert min(one.attempts for one in carried) == 1, FEW


async def test_the_http_interface_runs_an_episode(service: Service) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/readyz")).json()["version"] == 1
        assert "singlestream_rollout_reward_bucket" in (await client.get("/metrics")).text
        body = {"question": "3+4=?", "answer": "7", "environment": "single_turn"}
        trace = (await client.post("/v1/episodes", json=body)).json()
        assert trace["end_reason"] == "length"
        assert [segment["kind"] for segment in trace["segments"]] == ["prompt", "generated"]
        generated = trace["segments"][1]
        assert generated["version"] == 1
        assert len(generated["logprobs"]) == len(generated["token_ids"]) == RESPONSE_TOKENS
        refused = await client.post("/v1/episodes", json={**body, "environment": "no_such"})
        assert refused.status_code == 422
        for stream in (False, True):  # what only the engine can tell
            refused = await client.post("/v1/completions", json={"prompt": [10**6], "stream": stream})
            assert refused.status_code == 422
            assert "out of vocabulary" in refused.json()["detail"]


async def test_the_openai_client_works(service: Service) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none") as client:
        [model] = [one async for one in client.models.list()]
        assert model.id == "replicas"
        done = await client.completions.create(model=model.id, prompt="3+4=?", max_tokens=7, n=2, logprobs=0)
        assert [choice.finish_reason for choice in done.choices] == ["length", "length"]
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 14)
        assert len(done.choices[0].logprobs.token_logprobs) == 7
        messages = [{"role": "user", "content": "3+4=?"}]
        chat = await client.chat.completions.create(model=model.id, messages=messages, max_tokens=9, temperature=0)
        whole = chat.choices[0].message.content
        parts = []
        async for chunk in await client.chat.completions.create(
            model=model.id, messages=messages, max_tokens=9, temperature=0, stream=True
        ):
            parts.append(chunk.choices[0].delta.content)
        assert "".join(parts) == whole
        assert len(parts) > 1
        with pytest.raises(openai.UnprocessableEntityError):
            await client.chat.completions.create(model=model.id, messages=messages, seed=1)
        with pytest.raises(openai.UnprocessableEntityError):
            await client.completions.create(model=model.id, prompt="x" * 600)


async def test_a_stopped_service_hands_everything_over(service: Service) -> None:
    before = await service.redis.xlen(service.keys.trajectories)
    for _ in range(SLOTS):  # one after the other, so that some have tokens whenever they are stopped
        await service.add(1, 1)
        await asyncio.sleep(0.15)
    await service.add(MANY - SLOTS, 1)
    await service.busy(1)
    children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 180) == 0
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 60)
    assert not alive
    finished = await service.redis.xlen(service.keys.trajectories) - before
    waiting = [decode(f[b"m"]) for _, f in await service.redis.xrange(service.keys.leases("train"))]
    assert finished + len(waiting) == MANY
    carried = [one.progress for one in waiting if isinstance(one, Lease) and one.progress is not None]
    assert carried
    assert all(len(progress.segments[-1].token_ids) > 0 for progress in carried)
    assert min(one.attempts for one in waiting if isinstance(one, Lease) and one.progress is not None) == 0, FEW
    assert await service.reports() == {}
