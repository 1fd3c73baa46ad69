"""Which replicas hold their weights for a pinned evaluation, and on which policy version.

Pure, from the replicas' reports. One replica is asked first, and what it holds then is the job's version; those that
hold the same join it, up to their number allowed. So a pin needs no weights but those that an engine has loaded
already, and when no replica is left that has them, the job ends with that as its cause: replicas load only what
compares greater.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.value_store.jobs import Job
from singlestream.streams.pins import Pin


@dataclass(frozen=True)
class Replica:
    """A rollout replica's last report; see `singlestream.streams.Keys.replicas`.

    ``at_s`` is when it came in, by this store's clock (`receipts`).
    """

    name: str
    slots: int
    in_use: int
    version: int | None
    lineage: int | None
    at_s: float
    pinned: str | None = None

    def alive(self, now_s: float) -> bool:
        """Whether it has reported lately."""
        return now_s - self.at_s < ALIVE_S

    @property
    def policy(self) -> tuple[int, int]:
        """(version, lineage) of its weights; (0, 0) is the model's folder."""
        return (self.version or 0, self.lineage or 0)


ALIVE_S = 10.0
"""A replica that has not reported for so long is not counted; it reports every 2 s."""


def current_evaluation(jobs: Iterable[Job]) -> Job | None:
    """The evaluation under way: they run one at a time, oldest first, so that a stream never holds two policies'."""
    waiting = [job for job in jobs if job.purpose == "evaluate" and job.finished_at_s is None]
    return min(waiting, key=lambda job: (job.created_at_s, job.job_id), default=None)


def capacity(alive: int, share: float, training: bool) -> int:
    """Replicas that a pinned evaluation may take, of so many; while training runs its share of them, or one."""
    return min(alive, max(1, math.floor(share * alive + 1e-9))) if training else alive


def next_pin(pin: Pin | None, job: Job | None, alive: Sequence[Replica], most: int) -> Pin | None:
    """The pin as it should stand now.

    Args:
        pin: as it stands.
        job: the evaluation under way.
        alive: reports of the living replicas.
        most: replicas that it may take.
    """
    if job is None or not job.pinned:
        return None
    if pin is None or pin.job != job.job_id:
        pin = Pin(job.job_id)
    policy = job.policy or _answer(pin, alive)
    if policy is None:
        return Pin(job.job_id, _asked(pin, alive, most))
    holders = [one.name for one in alive if one.policy == policy]
    holders.sort(key=lambda name: (name not in pin.replicas, name))
    return Pin(job.job_id, tuple(holders[:most]), *policy)


def _answer(pin: Pin, alive: Sequence[Replica]) -> tuple[int, int] | None:
    """What the replica that was asked holds, once it says that it holds still."""
    answers = [one.policy for one in alive if one.name in pin.replicas and one.pinned == pin.job]
    return answers[0] if answers else None


def _asked(pin: Pin, alive: Sequence[Replica], most: int) -> tuple[str, ...]:
    """The one replica to ask: the same as before while it lives, else the one with the newest weights."""
    if most < 1 or not alive:
        return ()
    return (max(alive, key=lambda one: (one.name in pin.replicas, one.policy, one.name)).name,)


def lost(policy: tuple[int, int] | None, alive: Sequence[Replica]) -> str | None:
    """Why a version can be evaluated no more: every living replica has gone past it. None where one has not."""
    if policy is None or not alive or any(one.policy <= policy for one in alive):
        return None
    held = ", ".join(sorted({"{}.{}".format(*one.policy) for one in alive}))
    return "policy version {}.{} is on no replica any more, they hold {}".format(*policy, held)


def waiting_for(job: Job, first: Job | None, pin: Pin | None, alive: Sequence[Replica]) -> str | None:
    """What keeps an unfinished job from being leased; None where nothing does.

    Args:
        job: the job.
        first: the evaluation under way.
        pin: the pin as it stands.
        alive: reports of the living replicas.
    """
    if job.finished_at_s is not None:
        return None
    if not alive:
        return f"a rollout replica: none has reported in the last {ALIVE_S:.0f} s"
    if job.purpose == "evaluate" and first is not None and first is not job:
        return f"job {first.job_id}: evaluations run one at a time"
    if not job.pinned:
        return None
    if job.policy is None:
        return "a replica to hold its weights"
    if pin is None or not pin.replicas:
        return f"a replica that holds policy version {job.version}.{job.lineage}"
    return None
