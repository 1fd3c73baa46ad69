"""Estimation and evaluation jobs: which items are still to be leased, and what came of the others.

There is no clock and no client inside.

A job asks for ``n`` rewards of each of its prompts. Item ``i`` is repetition ``i % n`` of prompt ``i // n``.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Literal

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from singlestream.contracts import Sampling

MAX_RETRIES = 3
"""Leases of one item after its first one failed."""

_PENDING, _LEASED, _DONE, _FAILED = range(4)


class ItemResult(BaseModel):
    """What one item came to; stands in Redis for the life of the run."""

    model_config = ConfigDict(frozen=True)

    lease_id: str
    failures: int = 0
    """Leases of this item that have failed so far."""
    reward: float | None = None
    """None: failed."""
    version: int | None = None
    """Policy version of the last generated segment."""
    turns: int = 0
    tool_calls: int = 0
    action_tokens: int = 0
    """Tokens that the policy generated."""
    response_tokens: int = 0
    """Tokens after the prompt, tools' output included."""
    answer: str | None = None
    """What the model boxed last; None without a box."""
    end_reason: str = ""
    """Why the episode ended, or why the lease failed."""

    def pack(self) -> bytes:
        """As it stands in Redis."""
        return bytes(msgpack.packb(self.model_dump(), use_bin_type=True))


class Job:
    """One job and the state of its items.

    Args:
        job_id: its number.
        purpose: ``estimate`` (priors) or ``evaluate``.
        prompt_ids: distinct prompts.
        n: rewards a prompt.
        sampling: how the engine samples.
        created_at_s: Unix time.
        finished_at_s: Unix time of the last item's end, or of the job's failure; None while items are open.
        summary: totals of a finished job, as `summary` gave them.
        pinned: whether one policy version samples everything (`pinning`).
        version: that version; None until it is known, and for a job that is not pinned.
        lineage: of that version.
        error: why the job ended before all of its items did; None otherwise.
    """

    def __init__(
        self,
        job_id: str,
        purpose: Literal["estimate", "evaluate"],
        prompt_ids: list[str],
        n: int,
        sampling: Sampling,
        created_at_s: float,
        finished_at_s: float | None = None,
        summary: dict[str, Any] | None = None,
        pinned: bool = False,
        version: int | None = None,
        lineage: int | None = None,
        error: str | None = None,
    ) -> None:
        self.pinned, self.version, self.lineage, self.error = pinned, version, lineage, error
        self.job_id, self.purpose, self.prompt_ids, self.n, self.sampling = job_id, purpose, prompt_ids, n, sampling
        self.created_at_s, self.finished_at_s = created_at_s, finished_at_s
        self._final = summary
        total = 0 if finished_at_s is not None else self.total
        self._state: NDArray[np.uint8] = np.zeros(total, np.uint8)
        self.rewards: NDArray[np.float32] = np.full(total, np.nan, np.float32)
        self._failures: Counter[int] = Counter()
        self._again: deque[int] = deque()
        self._next = 0
        self.done = self.failed = 0
        self._sums = {"reward": 0.0, "tool_calls": 0.0, "response_tokens": 0.0}
        self._versions: Counter[int] = Counter()
        if summary is not None:
            self.done, self.failed = summary["done"], summary["failed"]

    @property
    def total(self) -> int:
        """Items of the job."""
        return len(self.prompt_ids) * self.n

    @property
    def finished(self) -> bool:
        """Whether every item has a reward or has failed for good."""
        return self.done + self.failed >= self.total

    @property
    def policy(self) -> tuple[int, int] | None:
        """(version, lineage) that a pinned job is held to, once it is known."""
        return None if self.version is None or self.lineage is None else (self.version, self.lineage)

    def same_as(self, other: Job) -> bool:
        """Whether both ask for the same rewards."""
        mine, theirs = ((job.purpose, job.n, job.sampling, job.pinned, job.prompt_ids) for job in (self, other))
        return mine == theirs

    def fail(self, error: str, now_s: float) -> None:
        """End the job before its items. Leases of it that are still out end by themselves, without effect on it."""
        self.error, self.finished_at_s = error, now_s
        self._final = self.summary()

    def prompt_of(self, item: int) -> str:
        """Prompt of an item."""
        return self.prompt_ids[item // self.n]

    def peek(self, count: int) -> list[int]:
        """The next items to lease, at most ``count``; they stay pending until `lease`."""
        items = [item for item in self._again if self._state[item] == _PENDING][:count]
        item = self._next
        while len(items) < count and item < len(self._state):
            if self._state[item] == _PENDING and item not in self._failures:
                items.append(item)
            item += 1
        return items

    def lease(self, item: int) -> None:
        """Mark an item as leased: by `peek` and issue, or found outstanding in Redis."""
        if self.finished_at_s is not None:
            return  # a failed job's last leases
        self._state[item] = _LEASED
        if item in self._failures:
            with contextlib.suppress(ValueError):
                self._again.remove(item)
        while self._next < len(self._state) and (self._state[self._next] != _PENDING or self._next in self._failures):
            self._next += 1

    def next_failure(self, item: int) -> int:
        """How many leases of the item will have failed once one more does."""
        return self._failures[item] + 1

    def settles(self, failures: int) -> bool:
        """Whether so many failed leases end an item for good."""
        return failures > MAX_RETRIES

    def record(self, item: int, result: ItemResult) -> None:
        """Take an item's result.

        A reward, a failure to be leased again, or a failure for good. A settled item stays as it is.
        """
        if self._state[item] in (_DONE, _FAILED):
            return
        if result.reward is not None:
            self._state[item] = _DONE
            self.rewards[item] = result.reward
            self.done += 1
            self._sums["reward"] += result.reward
            self._sums["tool_calls"] += result.tool_calls
            self._sums["response_tokens"] += result.response_tokens
            if result.version is not None:
                self._versions[result.version] += 1
        elif self.settles(result.failures):
            self._state[item] = _FAILED
            self.failed += 1
        else:
            self._state[item] = _PENDING
            self._failures[item] = result.failures
            self._again.append(item)

    def offline_rewards(self, item: int) -> NDArray[np.float32] | None:
        """All rewards of the item's prompt once its last item has ended, failed ones left out.

        None while one is open.
        """
        start = item // self.n * self.n
        if not np.isin(self._state[start : start + self.n], (_DONE, _FAILED)).all():
            return None
        rewards = self.rewards[start : start + self.n]
        return np.asarray(rewards[~np.isnan(rewards)])

    def outstanding(self) -> int:
        """Items leased at the moment."""
        return int(np.count_nonzero(self._state == _LEASED))

    def summary(self) -> dict[str, Any]:
        """Totals; means are None before the first reward."""
        if self._final is not None:
            return self._final
        means = {f"{name}_mean": self._sums[name] / self.done if self.done else None for name in self._sums}
        versions = {str(version): count for version, count in sorted(self._versions.items())}
        return {"done": self.done, "failed": self.failed, **means, "versions": versions}

    def pack(self) -> bytes:
        """As it stands in Redis; a finished job carries its totals, so that its results need not be read again."""
        record = {
            "job_id": self.job_id,
            "purpose": self.purpose,
            "prompt_ids": self.prompt_ids,
            "n": self.n,
            "sampling": self.sampling.model_dump(),
            "created_at_s": self.created_at_s,
            "finished_at_s": self.finished_at_s,
            "summary": self.summary() if self.finished_at_s is not None else None,
            "pinned": self.pinned,
            "version": self.version,
            "lineage": self.lineage,
            "error": self.error,
        }
        return bytes(msgpack.packb(record, use_bin_type=True))

    @classmethod
    def unpack(cls, data: bytes) -> Job:
        """Inverse of `pack`; the items' states come from `record` and `lease`."""
        record = msgpack.unpackb(data, raw=False)
        return cls(**{**record, "sampling": Sampling.model_validate(record["sampling"])})


def resumable(jobs: Iterable[Job], job: Job) -> Job | None:
    """The newest job that asks for the same and has not failed; None where there is none.

    A finished evaluation is not gone back to: it tells of the policy that was.
    """
    same = [one for one in jobs if one.error is None and one.same_as(job)]
    same = [one for one in same if one.finished_at_s is None or one.purpose == "estimate"]
    return max(same, key=lambda one: one.created_at_s, default=None)


def surplus(jobs: Iterable[Job], kept: int) -> list[str]:
    """Numbers of the jobs that are dropped with their results: all finished ones but the ``kept`` finished last."""
    finished = sorted((job.finished_at_s, job.job_id) for job in jobs if job.finished_at_s is not None)
    return [job_id for _, job_id in finished[: max(0, len(finished) - kept)]]
