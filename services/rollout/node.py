"""One node of a Ray cluster with room for one replica, or more; a SIGTERM hands its episodes over before Ray ends.

A raylet that gets SIGTERM kills its replicas without warning. So this process stands before it: it marks the node as
draining in Redis, waits until no replica of the node reports any more, and only then ends Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import time
from pathlib import Path

from redis.asyncio import Redis

from services.rollout.process_env import NODE_VARIABLE, has_gpu, node_name
from services.rollout.scaling import OBJECT_STORE_BYTES, SLOT_RESOURCE
from singlestream.config import LOOPBACK, Config
from singlestream.errors import ConfigError
from singlestream.streams import LOST, Keys, connect

log = logging.getLogger(__name__)

SILENT_S = 10.0
"""A replica that has not reported for so long has died; it reports every 2 s."""
POLL_S = 0.2
RAY_STOP_S = 20.0
MARK_S = 3600
"""A drain mark that could not be taken away is gone after this; each new mark keeps the others as long."""
SLOTS_VARIABLE = "SINGLESTREAM_NODE_SLOTS"
"""Replicas that the node has room for; 1 where it is not set."""


def start_command(config: Config) -> list[str]:
    """``ray start`` for a node. Raises `ConfigError` without a cluster to join."""
    if config.rollout.ray_address is None:
        raise ConfigError("a node joins a cluster: set rollout.ray_address")
    slots = int(os.environ.get(SLOTS_VARIABLE, "1"))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--address={config.rollout.ray_address}", f"--resources={json.dumps({SLOT_RESOURCE: slots})}"]
    command += ["--num-cpus=1", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    if config.rollout.host not in LOOPBACK:
        command.append(f"--node-ip-address={config.rollout.host}")
    return [*command, f"--num-gpus={slots * config.rollout.tensor_parallel}"] if has_gpu() else command


async def handed_over(redis: Redis, keys: Keys, node: str, deadline_s: float) -> bool:
    """Mark the node as draining and wait until its replicas have signed off; False if one has not by the deadline."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        try:
            async with redis.pipeline() as pipe:
                pipe.hset(keys.draining, node, str(time.time()))
                pipe.expire(keys.draining, MARK_S)
                pipe.hgetall(keys.replicas)
                reports = (await pipe.execute())[-1]
        except LOST as error:
            log.warning("node %s drains, and Redis is away or refuses: %s", node, error)
        else:
            if not any(_lives_on(node, report) for report in reports.values()):
                return True
        await asyncio.sleep(POLL_S)
    return False


def _lives_on(node: str, report: bytes) -> bool:
    """Whether a replica of the node has reported lately; a report that cannot be read is none."""
    try:
        told = json.loads(report)
        return bool(told["node"] == node and time.time() - float(told["at_s"]) < SILENT_S)
    except (ValueError, KeyError, TypeError):
        return False


def _environment(node: str) -> dict[str, str]:
    """Of Ray, whose workers pass it on to the replica."""
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, NODE_VARIABLE: node, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


async def _serve(config: Config, command: list[str]) -> int:
    # never twice the same: a mark must not meet the node's successor
    node = f"{node_name()}-{secrets.token_hex(4)}"
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ray = await asyncio.create_subprocess_exec(*command, env=_environment(node), start_new_session=True)
    log.info("node %s joins %s", node, config.rollout.ray_address)
    ended, asked = asyncio.create_task(ray.wait()), asyncio.create_task(stop.wait())
    await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        asked.cancel()
        log.error("Ray of node %s ended by itself with %s", node, ray.returncode)
        return 1
    redis, keys = connect(config.run.redis_url), Keys(config.run.name)
    try:
        if await handed_over(redis, keys, node, 3 * config.rollout.stop_timeout_s):
            log.info("node %s: handed over", node)
        else:
            log.error("node %s: its replicas did not sign off in time; their leases wait for the time-out", node)
        ray.terminate()
        await asyncio.wait({ended}, timeout=RAY_STOP_S)
        if not ended.done():
            os.killpg(ray.pid, signal.SIGKILL)
            await ended
        await redis.hdel(keys.draining, node)
    except LOST as error:
        log.warning("the drain mark of node %s stays for %d s: %s", node, MARK_S, error)
    finally:
        await redis.aclose()
    return 0


def run_node(config: Config) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code, 1 if Ray ended by itself. Raises `ConfigError`."""
    return asyncio.run(_serve(config, start_command(config)))
