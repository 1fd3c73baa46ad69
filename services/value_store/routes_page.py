"""The page at ``/`` and what it asks for."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from services.value_store.recent import Recent, count_values
from services.value_store.routes_prompts import StoreDep
from services.value_store.routes_run import show_training
from services.value_store.schemas import LearnerOut, Overview, QueuesOut, Snapshot
from singlestream.clients.value_store_replies import Replica, Version

FOLDER = Path(__file__).parent / "page"
LEARNER_ALIVE_S = 30.0
SNAPSHOTS_SHOWN = 60
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
}

page = APIRouter(include_in_schema=False)
reads = APIRouter(prefix="/v1", tags=["run"])
static = StaticFiles(directory=FOLDER)


@page.get("/")
async def index() -> FileResponse:
    """The page itself needs no token; what it shows does."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@reads.get("/overview", summary="The run at a glance")
async def get_overview(store: StoreDep) -> Overview:
    """From memory alone: it answers while Redis is away, and says so."""
    memory, recent, now_s = store.memory, store.recent, time.time()
    newest = memory.newest
    return Overview(
        run=store.config.run.name,
        now_s=now_s,
        store_waiting_for=store.waiting_for,
        training=show_training(store),
        leases={
            purpose: {"leased": counts.leased, "outstanding": counts.outstanding, **counts.ended}
            for purpose, counts in memory.ledger().items()
        },
        reward_mean=_mean(recent.rewards),
        staleness_mean=_mean(recent.staleness),
        policy=Version(**asdict(newest)) if newest else None,
        z_now=memory.clock.now,
        queues=QueuesOut(**asdict(recent.queues)),
        learner=_learner(recent, now_s),
        replicas=[Replica(**asdict(replica), alive=replica.alive(now_s)) for replica in store.replicas],
        prompts=len(memory.table),
        visits=int(memory.table.visits.sum(dtype=np.int64)),
        v_hat_over_time=[*_snapshots(recent), Snapshot(at_s=now_s, counts=count_values(memory.table.v_hat))],
    )


def _mean(values: object) -> float | None:
    numbers = np.array(values, np.float64)
    return float(numbers.mean()) if len(numbers) else None


def _learner(recent: Recent, now_s: float) -> LearnerOut | None:
    if recent.learner is None:
        return None
    step, state, waits, at_s = (recent.learner.get(name) for name in ("step", "state", "waiting_for", "at_s"))
    at_s = float(at_s) if isinstance(at_s, int | float) else None
    return LearnerOut(
        step=step if isinstance(step, int) else None,
        state=str(state) if state is not None else None,
        waiting_for=str(waits) if waits is not None else None,
        at_s=at_s,
        alive=at_s is not None and now_s - at_s < LEARNER_ALIVE_S,
    )


def _snapshots(recent: Recent) -> list[Snapshot]:
    everything = list(recent.snapshots)
    places = np.unique(np.linspace(0, max(0, len(everything) - 1), SNAPSHOTS_SHOWN).astype(int))
    return [Snapshot(at_s=everything[i][0], counts=everything[i][1]) for i in places if i < len(everything)]
