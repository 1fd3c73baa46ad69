"""What the store does for jobs beyond leasing them: resuming, cancelling, and the pin of a pinned evaluation."""

from __future__ import annotations

import logging
import time

from services.value_store import pinning
from services.value_store.jobs import Job, resumable
from services.value_store.store import Store
from singlestream.streams.ledger import Change

log = logging.getLogger(__name__)


async def create_job(store: Store, job: Job, resume: bool) -> Job:
    """Enter a job, or return the one that it resumes, where ``resume`` says so.

    Raises `Refused` where prompts are not known.
    """
    if resume and (same := resumable(store.memory.jobs.values(), job)):
        return same
    return await store.create_job(job, resume)


async def cancel_job(store: Store, job_id: str) -> Job | None:
    """End a job before its items; leases of it that are out end by themselves. Nothing where it has finished.

    None where there is no such job.
    """
    async with store.writing() as memory:
        job = memory.jobs.get(job_id)
        if job is not None and job.finished_at_s is None:
            await _fail(store, job, "cancelled by request")
    return job


async def _fail(store: Store, job: Job, error: str) -> None:
    log.error("job %s ends: %s", job.job_id, error)
    job.fail(error, time.time())
    await store.commit(Change(jobs={job.job_id: job.pack()}))


async def move_pin(store: Store) -> None:
    """Say which replicas hold their weights for the evaluation under way; end it if none can any more."""
    async with store.writing() as memory:
        job, alive = pinning.current_evaluation(memory.jobs.values()), store.alive_replicas()
        if job is not None and (error := pinning.lost(job.policy, alive)):
            await _fail(store, job, error)
            job = pinning.current_evaluation(memory.jobs.values())
        share, training = store.config.rollout.evaluation_share, memory.state == "running"
        pin = pinning.next_pin(memory.pin, job, alive, pinning.capacity(len(alive), share, training))
        if pin == memory.pin:
            return
        change = Change(pin=pin.text() if pin else "")
        if pin is not None and job is not None and job.policy != pin.policy:
            job.version, job.lineage = pin.version, pin.lineage
            change.jobs[job.job_id] = job.pack()
        await store.commit(change)
        memory.pin = pin


def waiting_for(store: Store, job: Job) -> str | None:
    """What keeps a job from being leased; None where nothing does, and where it has finished."""
    memory, alive = store.memory, store.alive_replicas()
    if job.finished_at_s is None and store.memory_full:
        return "memory in Redis: its share of maxmemory is used up"
    return pinning.waiting_for(job, pinning.current_evaluation(memory.jobs.values()), memory.pin, alive)
