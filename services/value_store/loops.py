"""The store's background loops.

Updates, results, policy versions, and issuing leases. Each runs until it is cancelled or fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import chain

from services.value_store import evaluations, issuing
from services.value_store.ending import END_WITHIN_S, end
from services.value_store.evidence import Decode, Entry, decode_entries
from services.value_store.store import NotReady, Store
from singlestream.contracts import decode, decode_closing
from singlestream.errors import DeadlineExceeded
from singlestream.streams.connection import LOST
from singlestream.streams.keys import GROUP
from singlestream.streams.ledger import PURPOSES
from singlestream.streams.queues import ask_oldest

log = logging.getLogger(__name__)

UPDATES_PER_READ, UPDATES_AHEAD = 768, 8
"""Updates of one reply, and replies read and decoded while earlier ones are written. 768 are about 150 KB: such a reply
fits a socket's buffer, so it has left Redis before the next script holds it up."""
RESULTS_PER_READ, RESULTS_AHEAD = 256, 2
"""Results carry whole trajectories: 256 of 32k tokens are about 80 MB."""
BLOCK_MS = 1000
TICK_S = 0.05
"""A replica's free slot waits at most so long, and a script, for its next lease."""
TRAJECTORIES_PER_LOOK = 32
CHECK_EVERY_S = 1.0
"""How often Redis' memory, its run id and the fence are read."""
TIDY_EVERY_S = 60.0


async def follow_updates(store: Store) -> None:
    """Apply ``posterior_updates`` as they arrive."""
    await _follow(
        store, store.keys.posterior_updates, UPDATES_PER_READ, UPDATES_AHEAD, decode_closing, store.take_updates
    )


async def follow_results(store: Store) -> None:
    """Apply ``results`` as they arrive."""
    await _follow(store, store.keys.scored, RESULTS_PER_READ, RESULTS_AHEAD, decode, store.take_results)


async def _follow(
    store: Store,
    stream: str,
    count: int,
    ahead: int,
    decode: Decode,
    take: Callable[[str, Sequence[Entry]], Awaitable[None]],
) -> None:
    while True:
        await store.until_ready()
        memory = store.memory
        batches, room = asyncio.Queue[list[Entry]](), asyncio.Semaphore(ahead)
        after = memory.cursors.get(stream, "0-0")
        reading = asyncio.create_task(
            _read(store, stream, after, count, decode, batches, room), name=f"reader of {stream}"
        )
        try:
            more = True
            while more:
                found = [await batches.get()]
                while not batches.empty():
                    found.append(batches.get_nowait())
                for _ in found:
                    room.release()
                await take(memory.epoch, list(chain.from_iterable(found)))
                more = bool(found[-1])
        except NotReady:
            await asyncio.sleep(TICK_S)
        finally:
            await end([reading])
        if not reading.done():
            raise DeadlineExceeded(f"the reader of {stream} to end", END_WITHIN_S)
        if not reading.cancelled():
            reading.result()


async def _read(
    store: Store,
    stream: str,
    after: str,
    count: int,
    decode: Decode,
    batches: asyncio.Queue[list[Entry]],
    room: asyncio.Semaphore,
) -> None:
    """Put decoded replies into the queue until nothing comes for `BLOCK_MS`; an empty one is the last."""
    try:
        await room.acquire()
        while raw := await store.streams.read_stream(stream, after, count, BLOCK_MS):
            batches.put_nowait(decode_entries(raw, decode))
            after = raw[-1][0]
            await room.acquire()
    except LOST as error:
        store.doubt(error)
    finally:
        batches.put_nowait([])


async def follow_versions(store: Store) -> None:
    """Note policy versions as the learner publishes them."""
    while True:
        await store.until_ready()
        memory = store.memory
        try:
            stream = store.keys.policy_versions
            for entry, _, data in await store.streams.read_stream(stream, memory.versions_cursor, 64, BLOCK_MS):
                store.note_version(memory.epoch, entry, data)
        except LOST as error:
            store.doubt(error)


async def follow_trajectories(store: Store) -> None:
    """Keep the newest trajectories for the page, at most `TRAJECTORIES_PER_LOOK` a second: the others are passed by."""
    memory, after = None, "0-0"
    while True:
        await store.until_ready()
        if memory is not store.memory:
            memory, after = store.memory, "0-0"  # after a restart of Redis the stream may have gone back
        with contextlib.suppress(*LOST):  # the loops that write find out what it means
            newest = await store.redis.xrevrange(store.keys.trajectories, "+", f"({after}", TRAJECTORIES_PER_LOOK)
            for _, fields in reversed(newest):
                store.recent.trajectories.add(fields.get(b"m", b""))
            after = newest[0][0].decode() if newest else after
        await asyncio.sleep(CHECK_EVERY_S)


async def issue_leases(store: Store) -> None:
    """Keep the lease streams as full as the living replicas need, and wind an early stop down."""
    checked_s = tidied_s = -math.inf
    while True:
        await store.until_ready()
        try:
            if time.monotonic() - checked_s > CHECK_EVERY_S:
                await check_redis(store)
                checked_s = time.monotonic()
            if store.memory.state == "stopping":
                await store.wind_down()
            shared, pinned = await _wanted(store)
            await evaluations.move_pin(store)
            if shared or pinned:
                await store.issue(shared, pinned)
            if time.monotonic() - tidied_s > TIDY_EVERY_S:
                await tidy(store)
                tidied_s = time.monotonic()
                if store.memory.state == "stopping":
                    log.warning("the early stop waits for %s", store.training_waits_for())
        except NotReady:
            pass
        except LOST as error:
            store.doubt(error)
        await asyncio.sleep(TICK_S)


async def tidy(store: Store) -> None:
    """Drop what has outlived its use in Redis: dead letters beyond their bound, consumers of dead replicas."""
    async with store.writing() as memory:
        kept = store.config.value_store.dead_letters_kept
        letters, consumers = await store.streams.tidy(kept, issuing.FORGOTTEN_S)
        memory.dead_letters_dropped += letters
    if letters or consumers:
        log.info("dropped %d dead letters and %d consumers of dead replicas", letters, consumers)


async def check_redis(store: Store) -> None:
    """Notice a restart of Redis, memory that runs out, another store; read what the page shows of the others."""
    keys, recent, cursors = store.keys, store.recent, store.memory.cursors
    applied = {stream: cursors.get(stream, "0-0") for stream in (keys.posterior_updates, keys.scored)}
    kept = dict.fromkeys((keys.trajectories, keys.dead_letters, *map(keys.leases, PURPOSES)), "0-0")
    async with store.redis.pipeline(transaction=False) as pipe:
        pipe.info()
        pipe.get(keys.fence("value_store"))
        pipe.get(keys.learner)
        ask_oldest(pipe, applied | kept)
        for stream in (keys.trajectories, keys.posterior_updates, keys.scored, keys.dead_letters):
            pipe.xlen(stream)
        info, fence, heartbeat, ages_ms, *lengths = await pipe.execute()
    store.streams.check_fence(fence)  # a store that has nothing to write would not learn it otherwise
    if str(info["run_id"]) != store.memory.redis_run_id:
        store.doubt(ConnectionError("Redis has restarted"))
        return
    limit = int(info["maxmemory"])
    full = bool(limit) and int(info["used_memory"]) >= store.config.value_store.redis_memory_share * limit
    if full and not store.memory_full:
        log.warning("leasing stops: Redis uses %d of %d bytes", info["used_memory"], limit)
    store.memory_full = full
    queues = recent.queues
    queues.trajectories, queues.posterior_updates, queues.results, queues.dead_letters = lengths
    queues.read_at_s = time.time()
    updates, results, trajectories, dead_letters, *leases = (age / 1000 for age in ages_ms)
    recent.oldest_s = {
        "leases": max(leases),
        "trajectories": trajectories,
        "posterior_updates": updates,
        "results": results,
        "dead_letters": dead_letters,
    }
    recent.hear_learner(parse_heartbeat(heartbeat), time.time())
    recent.snapshot(time.time(), store.memory.table)


def parse_heartbeat(text: bytes | None) -> dict[str, object] | None:
    """The learner's heartbeat, or None where there is none that can be read."""
    try:
        found = json.loads(text) if text else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


async def _wanted(store: Store) -> tuple[int, int]:
    """`issuing.shared_and_pinned`, as Redis stands now."""
    keys = store.keys
    async with store.redis.pipeline(transaction=False) as pipe:
        pipe.hgetall(keys.replicas)
        for purpose in PURPOSES:
            pipe.xlen(keys.leases(purpose))
            pipe.execute_command("XPENDING", keys.leases(purpose), GROUP)
        raw, *lengths = await pipe.execute()
    now_s, reports = time.time(), issuing.parse_replicas(raw)
    came_s = store.receipts.note({one.name: one.at_s for one in reports}, now_s)
    reports = [replace(one, at_s=came_s[one.name]) for one in reports]
    store.replicas = [one for one in reports if now_s - one.at_s < issuing.FORGOTTEN_S]
    if gone := [one.name for one in reports if now_s - one.at_s >= issuing.FORGOTTEN_S]:
        await store.redis.hdel(keys.replicas, *gone)  # killed ones never sign off
    counts = [pending["pending"] if isinstance(pending, dict) else pending[0] for pending in lengths[1::2]]
    held = dict(zip(PURPOSES, counts, strict=True))
    unread = {one: max(0, length - held[one]) for one, length in zip(PURPOSES, lengths[0::2], strict=True)}
    store.held, queues = held, store.recent.queues
    queues.held_leases, queues.unread_leases = sum(held.values()), sum(unread.values())
    return issuing.shared_and_pinned(store.alive_replicas(), store.memory.pin, held, unread)
