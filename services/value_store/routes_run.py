"""REST: the run's state, the ledger, policy versions, statistics, health and metrics."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Response

from services.value_store import issuing, metrics, sampler, views
from services.value_store.problems import problem_docs
from services.value_store.routes_prompts import StoreDep, bound
from services.value_store.schemas import Health, TrainingIn
from services.value_store.store import NotReady, Store
from singlestream.clients.value_store_replies import (
    Ledger,
    Policy,
    Preview,
    PurposeLedger,
    ReliabilityBin,
    Replica,
    Stats,
    Training,
    Version,
)
from singlestream.streams.ledger import read_ledger
from singlestream.streams.training import VERSIONS_KEPT

V_HAT_EDGES = tuple(i / 20 for i in range(21))
N_EFF_EDGES = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0)

reads = APIRouter(tags=["run"])
writes = APIRouter(tags=["run"])
health = APIRouter(tags=["health"])


@health.get("/healthz", summary="Whether the process answers")
async def healthz() -> Health:
    """Always 200 while the process lives."""
    return Health()


@health.get("/readyz", summary="Whether the store can write")
async def readyz(store: StoreDep) -> Health:
    """503 with what it waits for."""
    if store.waiting_for is not None:
        raise NotReady(f"the value store waits for {store.waiting_for}")
    return Health(epoch=store.memory.epoch, run=store.config.run.name)


@reads.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def get_metrics(store: StoreDep) -> Response:
    """In the text format."""
    return Response(metrics.render(store), media_type="text/plain; version=0.0.4")


@reads.get("/v1/training", summary="What training does")
async def get_training(store: StoreDep) -> Training:
    """Its state, and why no lease is issued where none is."""
    return show_training(store)


def show_training(store: Store) -> Training:
    """What training does, from memory."""
    memory, run = store.memory, store.config.run
    return Training(
        state=memory.state,
        waiting_for=store.training_waits_for(),
        trained=memory.admission.ended["trained"],
        total=run.total_steps * run.train_batch_size,
        outstanding=memory.admission.outstanding,
        headroom=memory.admission.headroom,
    )


@writes.put(
    "/v1/training",
    summary="Run, pause or stop training",
    responses=problem_docs(409),
)
async def set_training(store: StoreDep, body: TrainingIn) -> Training:
    """Stopping is final: leases that no replica has taken are cancelled; the learner trains what the others yield."""
    await store.set_training(body.state)
    return show_training(store)


@reads.get("/v1/ledger", summary="Where every lease is")
async def get_ledger(store: StoreDep) -> Ledger:
    """Read from Redis at one moment."""
    counts = await read_ledger(store.redis, store.keys)
    purposes = {
        purpose: PurposeLedger(leased=c.leased, outstanding=c.outstanding, adds_up=c.adds_up, **c.ended)
        for purpose, c in counts.items()
    }
    return Ledger(**purposes, duplicates=store.memory.duplicates, epoch=store.memory.epoch)


@reads.get("/v1/policy", summary="Policy versions and the drift clock")
async def get_policy(
    store: StoreDep,
    limit: Annotated[int, Query(ge=1, description="At most so many; the store keeps 1,024.")] = VERSIONS_KEPT,
) -> Policy:
    """The versions published last, oldest first."""
    memory = store.memory
    versions = [Version(**asdict(version)) for version in [*memory.versions][-limit:]]
    return Policy(newest=versions[-1] if versions else None, z_now=memory.clock.now, versions=versions)


@reads.get("/v1/preview", summary="What the sampler could draw next")
async def preview(store: StoreDep, count: Annotated[int, Query(ge=1)] = 32) -> Preview:
    """A draw that leases nothing; the next real draw is another one. Empty where every prompt is in flight."""
    bound(count, store.config.value_store.max_page, "prompts")
    weight = issuing.training_weights(store.memory, store.config.value_store, store.retention, store.rng)
    rows = sampler.draw(weight, count, store.rng).tolist()
    return Preview(prompts=views.value_outs(store.memory, store.config.value_store, store.retention, rows))


@reads.get("/v1/stats", summary="The table at a glance")
async def get_stats(store: StoreDep) -> Stats:
    """Histograms, sampling entropy and calibration."""
    return make_stats(store)


def make_stats(store: Store) -> Stats:
    """Statistics over all rows."""
    memory, retention, now_s = store.memory, store.retention, time.time()
    table, v_hat = memory.table, memory.table.v_hat
    weight = issuing.training_weights(memory, store.config.value_store, retention, store.rng)
    eligible = int(np.count_nonzero(weight))
    return Stats(
        prompts=len(table),
        prompts_train=issuing.training_prompts(table),
        visited=int(np.count_nonzero(table.visits)),
        visits=int(table.visits.sum(dtype=np.int64)),
        v_hat_mean=float(v_hat.mean()) if len(table) else None,
        v_hat_histogram=views.histogram(v_hat, V_HAT_EDGES),
        n_eff_histogram=views.histogram(views.faded_n_eff(memory, retention), N_EFF_EDGES),
        sampling_entropy_nats=sampler.entropy(weight),
        sampling_entropy_max_nats=float(np.log(eligible)) if eligible else 0.0,
        brier=memory.calibration.brier,
        reliability=[ReliabilityBin.model_validate(one) for one in memory.calibration.table()],
        replicas=[Replica(**asdict(replica), alive=replica.alive(now_s)) for replica in store.replicas],
    )
