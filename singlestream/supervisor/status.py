"""The one live line: where the run stands, from the learner's step log and Redis alone."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from singlestream.streams import GROUP, LOST, Keys

TAIL_BYTES = 65_536
ETA_STEPS = 10
"""Steps whose mean duration the estimate of the remaining time rests on."""
STILL_S = 60.0
"""The line says so where no step was made for so long, and for three usual ones."""


@dataclass(frozen=True)
class Queues:
    """Depths of the queues, in leases and trajectories.

    Args:
        unread: leases no replica has taken yet.
        running: leases in replicas' hands.
        outstanding: training leases not closed yet, trajectories waiting for the learner included.
        dead_letters: messages that could not be used, since the run began.
    """

    unread: int
    running: int
    outstanding: int
    dead_letters: int


async def read_queues(redis: Redis, keys: Keys) -> Queues | None:
    """Depths at this moment; None while Redis is away."""
    try:
        unread = running = 0
        for purpose in ("train", "estimate", "evaluate"):
            stream = keys.leases(purpose)
            held = 0
            if await redis.exists(stream):
                held = next((g["pending"] for g in await redis.xinfo_groups(stream) if g["name"].decode() == GROUP), 0)
            running += held
            unread += max(0, await redis.xlen(stream) - held)  # entries end between the two reads
        outstanding = await redis.hlen(keys.outstanding("train"))
        return Queues(unread, running, outstanding, await redis.xlen(keys.dead_letters))
    except LOST:
        return None


def read_steps(path: Path, count: int = ETA_STEPS + 1) -> list[dict[str, Any]]:
    """The last steps of a step log; a line still being written is left out."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    steps = []
    for line in lines[-count:]:
        try:
            steps.append(json.loads(line))
        except ValueError:
            continue
    return steps


def eta_s(steps: list[dict[str, Any]], total_steps: int) -> float | None:
    """Seconds left at the pace of the last steps; None before two steps are done."""
    if len(steps) < 2:
        return None
    return max(0.0, (total_steps - int(steps[-1]["step"])) * _pace_s(steps))


def _pace_s(steps: list[dict[str, Any]]) -> float:
    """Seconds of one of the last steps, of which there are two or more."""
    return float((steps[-1]["wall_s"] - steps[0]["wall_s"]) / (steps[-1]["step"] - steps[0]["step"]))


def _outlook(steps: list[dict[str, Any]], total_steps: int, since_s: float) -> str:
    """How long it will take, or for how long nothing has come of it."""
    left_s = eta_s(steps, total_steps)
    usual_s = _pace_s(steps) if left_s else 0.0
    if since_s > max(STILL_S, 3 * usual_s) and steps[-1]["step"] < total_steps:
        return f"no step for {since_s:.0f} s"
    return "ETA -" if left_s is None else f"ETA {left_s:.0f} s"


def since_step_s(path: Path) -> float:
    """Seconds since a step was last written to the log; 0 before the first."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def render(steps: list[dict[str, Any]], queues: Queues | None, total_steps: int, since_s: float = 0.0) -> str:
    """The line itself.

    Args:
        steps: the last ones, of `read_steps`.
        queues: None while Redis is away.
        total_steps: of the run.
        since_s: seconds since the last step.
    """
    parts = []
    if steps:
        last = steps[-1]
        parts += [
            f"step {last['step']}/{total_steps}",
            f"reward {last['reward_mean']:.3f}",
            f"tools {last['tool_calls_mean']:.2f}",
            f"staleness {last['staleness_mean']:.2f} (max {last['staleness_max']})",
            f"{last['tokens_per_s']:.0f} tokens/s",
            f"learner idle {100 * last['learner_idle_ratio']:.0f}%",
            _outlook(steps, total_steps, since_s),
        ]
    else:
        parts.append(f"step 0/{total_steps}")
    if queues is None:
        parts.append("Redis does not answer")
    else:
        parts.append(f"leases {queues.unread} unread {queues.running} running {queues.outstanding} open")
        if queues.dead_letters:
            parts.append(f"{queues.dead_letters} dead letters")
    return " | ".join(parts)
