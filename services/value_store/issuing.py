"""What to lease next, and how much.

The replicas' demand against what admission allows. Pure but for the random draw.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from services.value_store import posterior, sampler
from services.value_store.jobs import Job
from services.value_store.memory import Memory, OpenLease
from services.value_store.pinning import Replica, current_evaluation
from services.value_store.posterior import Retention
from services.value_store.prompts import Prompt
from services.value_store.table import SPLITS, Table
from singlestream.config import ValueStoreConfig
from singlestream.contracts import Lease, Purpose, Sampling, lease_id
from singlestream.errors import UnknownOutcome
from singlestream.streams.pins import Pin

Drawn = tuple[str, Job | None, int, Sampling]
"""Prompt id, job and item that ask for it (None, 0 for training), and how it is sampled."""

FORGOTTEN_S = 3600.0
"""After so long a replica's last report is removed."""

MAX_EVALUATIONS = 1_000_000
"""Where no share bounds them."""

EVERY_ROW = slice(None)

_NO_RNG = np.random.default_rng(0)
"""Where nothing is drawn."""

MIN_BACKLOG = 8
"""Unread leases kept at least while a replica lives, so that a fast one never finds the stream empty."""


def parse_replicas(raw: Mapping[bytes, bytes]) -> list[Replica]:
    """Reports as they stand in Redis, ``at_s`` by the replicas' clocks; one that cannot be read counts for nothing."""
    replicas = []
    for name, text in raw.items():
        try:
            report = json.loads(text)
            replicas.append(
                Replica(
                    name=name.decode(),
                    slots=int(report["slots"]),
                    in_use=int(report["in_use"]),
                    version=report.get("version"),
                    lineage=report.get("lineage"),
                    at_s=float(report["at_s"]),
                    pinned=report.get("pinned"),
                )
            )
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(replicas, key=lambda replica: replica.name)


def demand(slots: int, held: int, unread: int) -> int:
    """Leases that the streams should still get, ≥ 0: free slots and a quarter of all as backlog, less what is unread.

    Args:
        slots: of the living replicas.
        held: leases that replicas have taken and not ended.
        unread: leases that none has taken.
    """
    if slots <= 0:
        return 0
    return max(0, max(0, slots - held) + max(MIN_BACKLOG, slots // 4) - unread)


def shared_and_pinned(
    alive: Sequence[Replica], pin: Pin | None, held: Mapping[Purpose, int], unread: Mapping[Purpose, int]
) -> tuple[int, int]:
    """`demand` of the replicas that take anything, and of those that a pin keeps for evaluation.

    Args:
        alive: reports of the living replicas.
        pin: the pinned evaluation under way.
        held: purpose → leases that replicas have taken and not ended.
        unread: purpose → leases that none has taken.
    """
    kept = pin.replicas if pin is not None else ()
    free = sum(one.slots for one in alive if one.name not in kept)
    if pin is None:
        return demand(free, sum(held.values()), sum(unread.values())), 0
    mixed: tuple[Purpose, ...] = ("train", "estimate")
    shared = demand(free, sum(held[one] for one in mixed), sum(unread[one] for one in mixed))
    slots = sum(one.slots for one in alive if one.name in kept)
    return shared, demand(slots, held["evaluate"], unread["evaluate"])


def evaluation_room(outstanding: int, alive: Iterable[Replica], share: float, training: bool) -> int:
    """Evaluation leases that may be issued: while training runs, as many as keep to their share of all slots, ≥ 0."""
    if not training or share >= 1.0:
        return MAX_EVALUATIONS
    return max(0, math.ceil(share * sum(one.slots for one in alive)) - outstanding)


def split_demand(wanted: int, jobs: int, training: int) -> tuple[int, int]:
    """Share leases between jobs and training: half each, and what one side cannot use goes to the other.

    Args:
        wanted: leases in all.
        jobs: items that jobs could lease.
        training: leases that training could take.

    Returns:
        (for jobs, for training).
    """
    for_jobs = min(jobs, max((wanted + 1) // 2, wanted - training))
    return for_jobs, min(training, wanted - for_jobs)


def pending_items(jobs: Iterable[Job], count: int, evaluations: int) -> list[tuple[Job, int]]:
    """The next items of unfinished jobs, oldest job first, at most ``evaluations`` of them for evaluation."""
    items: list[tuple[Job, int]] = []
    for job in sorted(jobs, key=lambda job: (job.created_at_s, job.job_id)):
        room = count - len(items)
        if room <= 0:
            break
        if job.finished_at_s is None:
            items.extend(
                (job, item) for item in job.peek(min(room, evaluations) if job.purpose == "evaluate" else room)
            )
    return items


def items_to_lease(
    memory: Memory, alive: Sequence[Replica], share: float, wanted: int, pinned: int
) -> tuple[list[tuple[Job, int]], list[tuple[Job, int]]]:
    """Items of jobs to lease now: ``wanted`` that share with training, ``pinned`` of a pinned evaluation."""
    evaluation = current_evaluation(memory.jobs.values())
    shared = [job for job in memory.jobs.values() if job.purpose == "estimate"]
    held: list[tuple[Job, int]] = []
    if evaluation is not None and not evaluation.pinned:
        shared.append(evaluation)
    elif evaluation is not None and evaluation.policy is not None:
        held = pending_items([evaluation], pinned, pinned)
    room = evaluation_room(len(memory.open["evaluate"]), alive, share, memory.state == "running")
    return pending_items(shared, wanted, room), held


def all_weights(
    memory: Memory,
    settings: ValueStoreConfig,
    retention: Retention,
    rng: np.random.Generator | None = None,
    rows: NDArray[np.int64] | slice = EVERY_ROW,
) -> NDArray[np.float64]:
    """Sampling weight of rows. Without ``rng``, ``thompson`` shows the weight of the posterior mean."""
    table, mode = memory.table, settings.sampling
    if rng is None:
        mode, rng = ("uncertainty" if mode == "thompson" else mode), _NO_RNG
    faded = settings.gamma > 0.0 or mode == "thompson"
    fade: NDArray[np.float64] | float = fade_of(memory, retention, rows) if faded else 1.0
    return sampler.weights(table.alpha[rows], table.beta[rows], fade, mode, settings.epsilon, settings.gamma, rng)


def training_weights(
    memory: Memory, settings: ValueStoreConfig, retention: Retention, rng: np.random.Generator | None = None
) -> NDArray[np.float64]:
    """`all_weights`, but 0 where a training lease is outstanding or the prompt is not for training."""
    weight = all_weights(memory, settings, retention, rng)
    weight *= (memory.table.split == SPLITS.index("train")) & (memory.table.in_flight == 0)
    return weight


def fade_of(memory: Memory, retention: Retention, rows: NDArray[np.int64] | slice = EVERY_ROW) -> NDArray[np.float64]:
    """Share of each row's evidence that is still valid at the version published last."""
    version = memory.newest.version if memory.newest else 0
    return retention.fade(memory.clock.now, memory.table.z_last[rows], version, memory.table.version[rows])


def training_prompts(table: Table) -> int:
    """Prompts that training may draw, in flight or not."""
    return int(np.count_nonzero(table.split == SPLITS.index("train")))


def make_leases(
    memory: Memory,
    purpose: Purpose,
    drawn: Sequence[tuple[Drawn, Prompt | None]],
    mean_reward: float | None,
    shrinkage: float,
    now_s: float,
) -> list[tuple[Lease, OpenLease]]:
    """Leases with the values frozen now, and what the ledger keeps of them.

    Args:
        memory: not changed.
        purpose: of all of them.
        drawn: what to lease, with its text; None where Redis holds none.
        mean_reward: of the last batch, what v̂ is shrunk towards; None: not at all.
        shrinkage: κ ≥ 0, in observations.
        now_s: Unix time.

    Raises:
        UnknownOutcome: Redis and memory disagree on a prompt.
    """
    published = (memory.newest.version, memory.newest.lineage) if memory.newest else (0, 0)
    leases = []
    for n, ((prompt_id, job, item, sampling), prompt) in enumerate(drawn, memory.issued[purpose] + 1):
        row = memory.table.row(prompt_id)
        if prompt is None or row is None:
            raise UnknownOutcome(f"prompt {prompt_id} has a value but no text in Redis")
        v_hat = float(posterior.shrunk(memory.table.alpha[row], memory.table.beta[row], mean_reward, shrinkage))
        version, lineage = (job.policy if job else None) or published
        job_id = job.job_id if job else None
        lease = Lease(
            lease_id=lease_id(purpose, memory.epoch, n),
            prompt_id=prompt_id,
            question=prompt.question,
            answer=prompt.answer,
            source=prompt.source,
            environment=prompt.environment,
            v_hat=v_hat,
            version=version,
            lineage=lineage,
            sampling=sampling,
            job=job_id,
            pinned=job.pinned if job else False,
            issued_at_s=now_s,
        )
        leases.append((lease, OpenLease(prompt_id, v_hat, version, now_s, job_id, item, row)))
    return leases
