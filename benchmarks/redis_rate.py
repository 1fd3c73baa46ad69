"""Redis' own rate: the commands and bytes of the store's updates, packed beforehand and sent over a plain socket."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from redis.asyncio import Redis

from singlestream.streams import Keys
from singlestream.streams.anchors import is_anchored

REPLIES_AT_A_TIME = 1 << 20
DEADLINE_S = 120.0
_END = b"$3\r\nend\r\n"


def command(*parts: str | bytes) -> bytes:
    """A command as it goes over the wire."""
    data = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join([b"*%d\r\n" % len(data), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in data)])


async def update_commands(
    redis: Redis, keys: Keys, ids: list[str], done: Keys, batch: int, anchor_share: float
) -> list[bytes]:
    """What the store and its script have Redis do for the updates in the stream of ``keys``: one item a batch.

    Args:
        redis: where the stream and its outstanding leases are.
        keys: of that run.
        ids: prompt of each update.
        done: a run whose updates the store has applied: its records are what is written.
        batch: updates that the store applies at once.
        anchor_share: share of the prompts for which the script looks for a kept response; there is none.
    """
    entries = await redis.xrange(keys.posterior_updates)
    calibration = await redis.get(done.calibration)
    stream, outstanding = keys.posterior_updates, keys.outstanding("train")
    after, packed = "0-0", []
    for start in range(0, len(entries), batch):
        part, names = entries[start : start + batch], ids[start : start + batch]
        leases = [fields[b"id"] for _, fields in part]
        values, histories = await _written(redis, done, names)
        reading = command("XREAD", "COUNT", str(batch), "STREAMS", stream, after)
        after = part[-1][0].decode()
        packed.append(
            b"".join(
                [
                    reading,
                    command("GET", keys.fence("value_store")),
                    command("HGET", keys.cursors, stream),
                    command("HMGET", outstanding, *leases),
                    command("HDEL", outstanding, *leases),
                    command("HSET", keys.values, *chain.from_iterable(zip(names, values, strict=True))),
                    *(command("LPUSH", keys.history(name), one) for name, one in zip(names, histories, strict=True)),
                    command("HINCRBY", keys.ledger, "train:trained", str(len(part))),
                    command("SET", keys.calibration, calibration),
                    *_look_for_anchors(keys, leases, names, anchor_share),
                    command("HSET", keys.cursors, stream, after),
                    command("XTRIM", stream, "MINID", after),
                ]
            )
        )
    return packed


async def _written(redis: Redis, done: Keys, names: list[str]) -> tuple[list[bytes], list[bytes]]:
    """Values and newest history records of prompts."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.hmget(done.values, names)
        for name in names:
            pipe.lindex(done.history(name), 0)
        values, *histories = await pipe.execute()
    return values, histories


def _look_for_anchors(keys: Keys, leases: list[bytes], names: list[str], share: float) -> Iterator[bytes]:
    for lease, name in zip(leases, names, strict=True):
        if is_anchored(name, share):
            yield command("HGET", keys.anchor_of, name)
            yield command("HEXISTS", keys.anchors, lease)


def together(request: bytes) -> bytes:
    """The same commands in one transaction, which Redis writes and syncs once, as it does a script."""
    return command("MULTI") + request + command("EXEC")


async def seconds_of(path: Path, requests: list[bytes]) -> float:
    """Seconds in which Redis at a Unix socket answers all requests, sent one behind the other without waiting."""
    return await asyncio.to_thread(_send_all, path, requests)


def _send_all(path: Path, requests: list[bytes]) -> float:
    everything = [*requests, command("ECHO", "end")]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(str(path))
        sending = threading.Thread(target=lambda: [connection.sendall(one) for one in everything])
        started = time.perf_counter()
        sending.start()
        tail = b""
        while not tail.endswith(_END):
            reply = connection.recv(REPLIES_AT_A_TIME)
            if not reply:
                raise ConnectionError("Redis closed the connection")
            tail = (tail + reply)[-len(_END) :]
        seconds = time.perf_counter() - started
        sending.join()
    return seconds
