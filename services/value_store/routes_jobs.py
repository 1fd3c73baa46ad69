"""REST: estimation and evaluation jobs."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgpack
import numpy as np
from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from services.value_store import evaluations, views
from services.value_store.examples import AT_S, JOB_ID, RESULT
from services.value_store.jobs import Job
from services.value_store.problems import problem_docs
from services.value_store.routes_prompts import StoreDep, bound, read_cursor
from services.value_store.schemas import JobIn
from services.value_store.store import Store
from services.value_store.table import SPLITS
from singlestream.clients.value_store_replies import Job as JobOut
from singlestream.clients.value_store_replies import Jobs
from singlestream.contracts import Sampling

MAX_ITEMS = 20_000_000
"""Rewards that one job may ask for: 5 bytes each in memory."""
RESULTS_AT_A_TIME = 1000

EVALUATION = Sampling(temperature=0.6, top_p=0.95, top_k=20)
"""How the paper evaluates (arXiv 2509.13232)."""

reads = APIRouter(prefix="/v1", tags=["jobs"])
writes = APIRouter(prefix="/v1", tags=["jobs"])

JobPath = Annotated[str, Path(pattern=r"^[0-9a-f]{12}$", description="Job id.", examples=[JOB_ID])]
NOT_FOUND = problem_docs(404)
CURSOR = views.pack_cursor(-AT_S, int(JOB_ID, 16))


def show(store: Store, job: Job) -> JobOut:
    """A job as REST shows it."""
    ended: Literal["finished", "failed"] = "finished" if job.error is None else "failed"
    return JobOut(
        job_id=job.job_id,
        purpose=job.purpose,
        state="running" if job.finished_at_s is None else ended,
        error=job.error,
        waiting_for=evaluations.waiting_for(store, job),
        pinned=job.pinned,
        version=job.version,
        lineage=job.lineage,
        n=job.n,
        prompts=len(job.prompt_ids),
        total=job.total,
        outstanding=job.outstanding(),
        sampling=job.sampling,
        created_at_s=job.created_at_s,
        finished_at_s=job.finished_at_s,
        **job.summary(),
    )


def _found(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise HTTPException(404, f"no job {job_id}")
    return job


@writes.post(
    "/jobs",
    status_code=201,
    summary="Collect rewards for prompts",
    responses={200: {"model": JobOut, "description": "resume: the job that asked for the same."}, **problem_docs(409)},
)
async def create_job(store: StoreDep, body: JobIn, response: Response) -> JobOut:
    """An estimation sets each prompt's prior once all its rewards are there, if it has no visits yet.

    Jobs survive a restart.
    """
    if (body.split is None) == (body.prompt_ids is None):
        raise HTTPException(422, "give either split or prompt_ids")
    if body.prompt_ids is not None:
        bound(len(body.prompt_ids), store.config.value_store.max_prompts_per_request, "prompt_ids")
        ids = list(dict.fromkeys(body.prompt_ids))
    else:
        ids = _of_split(store, body)
    if not ids:
        raise HTTPException(422, "no prompts")
    bound(len(ids) * body.n, MAX_ITEMS, "rewards")
    sampling = Sampling(**body.sampling.model_dump()) if body.sampling else None
    if sampling is None:
        training = Sampling(temperature=store.config.run.temperature, top_p=1.0, top_k=0)
        sampling = training if body.purpose == "estimate" else EVALUATION
    if body.pinned and body.purpose != "evaluate":
        raise HTTPException(422, "only an evaluation can be pinned")
    new = Job(secrets.token_hex(6), body.purpose, ids, body.n, sampling, time.time(), pinned=body.pinned)
    job = await evaluations.create_job(store, new, body.resume)
    if job is not new:
        response.status_code = 200
    return show(store, job)


def _of_split(store: Store, body: JobIn) -> list[str]:
    assert body.split is not None  # noqa: S101  checked by the caller
    table = store.memory.table
    rows = np.flatnonzero(table.split == SPLITS.index(body.split))
    rows = rows[np.argsort(table.id_number[rows])][: body.limit]
    return [table.id(row) for row in rows]


@reads.get("/jobs", summary="All jobs, newest first")
async def list_jobs(
    store: StoreDep,
    limit: Annotated[int, Query(ge=1, description="Jobs a page; bounded by max_page.")] = 100,
    cursor: Annotated[str | None, Query(max_length=100, description="From the page before.", examples=[CURSOR])] = None,
) -> Jobs:
    """With their totals so far."""
    bound(limit, store.config.value_store.max_page, "jobs a page")
    after = read_cursor(cursor)
    places = {(-job.created_at_s, int(job.job_id, 16)): job for job in store.memory.jobs.values()}
    left = sorted(place for place in places if after is None or place > after)
    jobs = [show(store, places[place]) for place in left[:limit]]
    return Jobs(jobs=jobs, cursor=views.pack_cursor(*left[limit - 1]) if len(left) > limit else None)


@reads.get("/jobs/{job_id}", summary="One job", responses=NOT_FOUND)
async def get_job(store: StoreDep, job_id: JobPath) -> JobOut:
    """With its totals so far."""
    return show(store, _found(store.memory.jobs.get(job_id), job_id))


@writes.post("/jobs/{job_id}/cancel", summary="End a job early", responses=NOT_FOUND)
async def cancel_job(store: StoreDep, job_id: JobPath) -> JobOut:
    """Nothing more is leased for it; its results so far stay. A finished job stays as it is."""
    return show(store, _found(await evaluations.cancel_job(store, job_id), job_id))


@reads.get(
    "/jobs/{job_id}/results",
    summary="Every result of a job",
    response_class=StreamingResponse,
    responses={
        **NOT_FOUND,
        200: {
            "description": "NDJSON, one result a line.",
            "content": {"application/x-ndjson": {"example": json.dumps(RESULT) + "\n"}},
        },
    },
)
async def get_results(store: StoreDep, job_id: JobPath) -> StreamingResponse:
    """One JSON object a line, by prompt and repetition; items without a result yet are left out.

    Fields: prompt_id, repetition, lease_id, reward (null: failed), version, turns, tool_calls, action_tokens,
    response_tokens, answer (what was boxed last), end_reason, failures.
    """
    job = _found(store.memory.jobs.get(job_id), job_id)
    return StreamingResponse(_lines(store, job), media_type="application/x-ndjson")


async def _lines(store: Store, job: Job) -> AsyncIterator[bytes]:
    key = store.keys.job_results(job.job_id)
    for start in range(0, job.total, RESULTS_AT_A_TIME):
        items = range(start, min(start + RESULTS_AT_A_TIME, job.total))
        found = await store.redis.hmget(key, [str(item) for item in items])
        for item, data in zip(items, found, strict=True):
            if data is None:
                continue
            result = msgpack.unpackb(data, raw=False)
            if result["reward"] is None and not job.settles(result["failures"]):
                continue  # it will be leased again
            line = {"prompt_id": job.prompt_of(item), "repetition": item % job.n, **result}
            yield json.dumps(line).encode() + b"\n"
