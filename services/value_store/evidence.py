"""From entries of the streams to one atomic change.

Which leases end how, and what that does to values, jobs and histories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgpack
import numpy as np
from numpy.typing import NDArray

from services.value_store import posterior
from services.value_store.admission import TRAINING_ENDS
from services.value_store.calibration import Calibration
from services.value_store.jobs import ItemResult
from services.value_store.memory import Memory, OpenLease
from services.value_store.posterior import Floats, Retention
from singlestream.contracts import Outcome, PosteriorUpdate, Tombstone, Trajectory, decode
from singlestream.errors import ContractError
from singlestream.streams.ledger import Change

Entry = tuple[str, bytes, bytes]
"""(stream entry, lease, encoded message)."""

_Message = PosteriorUpdate | Trajectory | Tombstone

HISTORY_FIELDS = (
    "lease_id",
    "outcome",
    "version",
    "reward",
    "rho",
    "v_hat_before",
    "v_hat_after",
    "n_eff",
    "z",
    "v_hat_at_lease",
    "at_s",
)
"""A history record is a msgpack list in this order."""


@dataclass
class Batch:
    """A change, and what it does to memory once it is committed.

    Args:
        change: for Redis.
        rows: [P] distinct rows of the table whose posterior changes, with their new columns.
        calibration: the new sums; None leaves them.
        entries: stream entries that it covers.
        rho: [P] ρ of the updates, for metrics.
        rewards: [P] their rewards.
        staleness: [P] policy versions published since each trajectory's last one, ≥ 0.
    """

    change: Change
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    columns: dict[str, Floats | NDArray[np.int64]] = field(default_factory=dict)
    calibration: Calibration | None = None
    entries: int = 0
    rho: Floats = field(default_factory=lambda: np.empty(0))
    rewards: Floats = field(default_factory=lambda: np.empty(0))
    staleness: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def apply(self, memory: Memory) -> None:
        """Bring memory to where Redis now is."""
        for name, values in self.columns.items():
            getattr(memory.table, name)[self.rows] = values
        memory.close(self.change.closes)
        memory.duplicates += self.change.duplicates
        if self.calibration is not None:
            memory.calibration = self.calibration
        if self.change.stream:
            memory.cursors[self.change.stream] = self.change.after
        if self.change.state is not None:
            memory.state = self.change.state


@dataclass
class _Evidence:
    """Columns of the updates that count, in stream order."""

    leases: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    at_lease: list[float] = field(default_factory=list)

    def add(self, update: PosteriorUpdate, row: int, v_hat_at_lease: float) -> None:
        """Append one update that carries a reward and a version."""
        assert update.reward is not None and update.version is not None  # noqa: S101  the contract's validator holds this
        self.leases.append(update.lease_id)
        self.outcomes.append(update.outcome)
        self.rows.append(row)
        self.rewards.append(update.reward)
        self.versions.append(update.version)
        self.kl.append(np.nan if update.kl is None else update.kl)
        self.at_lease.append(v_hat_at_lease)


def _decoded(
    entries: Sequence[Entry], source: str, kinds: tuple[type, ...], memory: Memory, change: Change
) -> Iterator[tuple[int, _Message, OpenLease]]:
    """Messages that name an outstanding lease and its prompt, each lease once, with their place among the entries.

    Duplicates are counted, and what cannot be used becomes a dead letter.
    """
    closed: set[str] = set()
    for place, (_, raw, data) in enumerate(entries):
        number = raw.decode(errors="replace")
        try:
            message = decode(data)
        except ContractError as error:
            change.dead_letters.append((source, number, str(error)[:2000], data))
            if number not in closed and memory.find(number) is not None:
                closed.add(number)  # its end has been written, however badly: nobody will write another
                change.closes.append((number, "failed"))
            continue
        if not isinstance(message, PosteriorUpdate | Trajectory | Tombstone) or not isinstance(message, kinds):
            change.dead_letters.append((source, number, f"a {type(message).__name__} does not belong here", data))
            continue
        if reason := _misplaced(message):
            change.dead_letters.append((source, number, reason, data))
            continue
        lease = memory.find(message.lease_id)
        if lease is None or message.lease_id in closed:
            change.duplicates += 1
        elif message.prompt_id != lease.prompt_id and not (message.prompt_id == "" and _fails(message)):
            reason = f"the lease is for prompt {lease.prompt_id}, the message names {message.prompt_id!r}"
            change.dead_letters.append((source, number, reason, data))
        else:
            closed.add(message.lease_id)
            yield place, message, lease


def _misplaced(message: _Message) -> str:
    """Why a message cannot end the lease that it names; empty where it can."""
    trains = message.lease_id.startswith("train:")
    if isinstance(message, PosteriorUpdate):
        if not trains or message.outcome not in TRAINING_ENDS:
            return f"no update closes {message.lease_id} as {message.outcome}"
    elif trains:
        return "the result of a training lease belongs to the learner"
    return ""


def _fails(message: _Message) -> bool:
    return isinstance(message, Tombstone) or (isinstance(message, PosteriorUpdate) and message.outcome == "failed")


def plan_updates(
    entries: Sequence[Entry], stream: str, memory: Memory, retention: Retention, now_s: float, total: int
) -> Batch:
    """The change that a stretch of ``posterior_updates`` makes.

    Every row changes once: where a second update of a prompt follows, the batch ends before it.

    Args:
        entries: in stream order, at least one.
        stream: key of the stream.
        memory: not changed.
        retention: how old evidence fades.
        now_s: Unix time of this change.
        total: trajectories that the whole run trains on; once they are trained, training is finished.

    Raises:
        UnknownVersions: look these up, then plan again.
    """
    evidence, taken, seen = _Evidence(), len(entries), set[int]()
    change = Change(stream=stream, before=memory.cursors.get(stream, "0-0"))
    for place, message, lease in _decoded(entries, stream, (PosteriorUpdate,), memory, change):
        assert isinstance(message, PosteriorUpdate)  # noqa: S101  for the type checker
        row = memory.table.row(lease.prompt_id)
        if message.reward is not None and row is not None:
            if row in seen:
                taken = place
                break
            seen.add(row)
            evidence.add(message, row, lease.v_hat)
        change.closes.append((message.lease_id, message.outcome))
    memory.clock.require(evidence.versions)
    change.after = entries[taken - 1][0]
    batch = Batch(change, entries=taken)
    if evidence.rows:
        _revise(batch, evidence, memory, retention, now_s)
    trained = memory.ended["train"].get("trained", 0) + sum(outcome == "trained" for _, outcome in change.closes)
    if trained >= total and memory.state in ("running", "paused"):
        change.state = "finished"
    return batch


def _revise(batch: Batch, evidence: _Evidence, memory: Memory, retention: Retention, now_s: float) -> None:
    """New posteriors, records and histories of the prompts that have evidence."""
    table, rows = memory.table, np.array(evidence.rows, np.int64)
    reward, version = np.array(evidence.rewards), np.array(evidence.versions, np.int64)
    z, z_last, version_last = memory.clock.lookup(version), table.z_last[rows], table.version[rows]
    rho = retention.rho(z, z_last, version, version_last, np.array(evidence.kl))
    before = posterior.v_hat(table.alpha[rows], table.beta[rows])
    alpha, beta = posterior.update(table.alpha[rows], table.beta[rows], rho, reward)
    batch.rows, batch.rho, batch.rewards = rows, rho, reward
    newest = memory.newest.version if memory.newest else 0
    batch.staleness = np.maximum(0, newest - version)
    batch.columns = {
        "alpha": alpha,
        "beta": beta,
        "z_last": np.fmax(z, z_last),
        "version": np.maximum(version, version_last),
        "visits": table.visits[rows].astype(np.int64) + 1,
        "updated_at_s": np.full(len(rows), now_s),
    }
    ids = [table.id(row) for row in evidence.rows]
    batch.change.values = dict(zip(ids, table.records(rows, **batch.columns), strict=True))
    columns = (rho, before, posterior.v_hat(alpha, beta), alpha + beta, z)
    lists = zip(
        evidence.leases,
        evidence.outcomes,
        evidence.versions,
        evidence.rewards,
        *(c.tolist() for c in columns),
        evidence.at_lease,
        strict=True,
    )
    batch.change.history = [
        (prompt_id, msgpack.packb((*fields, now_s))) for prompt_id, fields in zip(ids, lists, strict=True)
    ]
    batch.calibration = memory.calibration.with_evidence(np.array(evidence.at_lease), reward)
    batch.change.calibration = batch.calibration.pack()


def plan_results(entries: Sequence[Entry], stream: str, memory: Memory, rho_min: float, now_s: float) -> Batch:
    """The change that a stretch of ``results`` makes: leases close, jobs advance, priors are set.

    The jobs in memory advance here already: should the change fail to be written, memory is forgotten as a whole.

    Args:
        entries: in stream order, at least one.
        stream: key of the stream.
        memory: its jobs take the results.
        rho_min: floor of ρ: the prior is worth 1/(1 − rho_min) observations.
        now_s: Unix time of this change.

    Raises:
        UnknownVersions: look these up, then plan again; nothing has changed yet.
    """
    change = Change(stream=stream, before=memory.cursors.get(stream, "0-0"), after=entries[-1][0])
    ended: list[tuple[OpenLease, ItemResult]] = []
    for _, message, lease in _decoded(entries, stream, (Trajectory, Tombstone), memory, change):
        change.closes.append((message.lease_id, "scored" if isinstance(message, Trajectory) else "failed"))
        ended.append((lease, _item_result(message, lease, memory)))
    memory.clock.require(result.version for _, result in ended if result.version is not None)
    known = {result.lease_id for _, result in ended}
    for number, _ in change.closes:
        if number not in known and (damaged := memory.find(number)):  # closed because its message was damaged
            ended.append((damaged, _failed_item(number, "malformed", damaged, memory)))
    priors: dict[int, tuple[float, float, float, int]] = {}
    for lease, result in ended:
        job = memory.jobs.get(lease.job or "")
        if job is None:
            continue
        job.record(lease.item, result)
        change.job_results.setdefault(job.job_id, {})[str(lease.item)] = result.pack()
        if job.purpose == "estimate" and (rewards := job.offline_rewards(lease.item)) is not None and len(rewards):
            row = memory.table.row(lease.prompt_id)
            if row is not None and memory.table.visits[row] == 0:
                alpha, beta = posterior.prior(float(rewards.sum(dtype=np.float64)), len(rewards), rho_min)
                version = result.version if result.version is not None else lease.version
                priors[row] = (float(alpha), float(beta), memory.clock.z_of(version), version)
        if job.finished and job.finished_at_s is None:
            job.finished_at_s = now_s
            change.jobs[job.job_id] = job.pack()
    batch = Batch(change, entries=len(entries))
    if priors:
        _set_priors(batch, priors, memory, now_s)
    return batch


def _set_priors(batch: Batch, priors: dict[int, tuple[float, float, float, int]], memory: Memory, now_s: float) -> None:
    batch.rows = np.array(list(priors), np.int64)
    alpha, beta, z, version = (np.array(column) for column in zip(*priors.values(), strict=True))
    batch.columns = {
        "alpha": alpha,
        "beta": beta,
        "z_last": z,
        "version": version,
        "updated_at_s": np.full(len(alpha), now_s),
    }
    ids = [memory.table.id(row) for row in priors]
    batch.change.values = dict(zip(ids, memory.table.records(batch.rows, **batch.columns), strict=True))


def _item_result(message: _Message, lease: OpenLease, memory: Memory) -> ItemResult:
    if not isinstance(message, Trajectory):
        reason = message.reason if isinstance(message, Tombstone) else "malformed"
        return _failed_item(message.lease_id, reason, lease, memory)
    return ItemResult(
        lease_id=message.lease_id,
        reward=message.reward,
        version=message.last_version,
        turns=message.turns,
        tool_calls=len(message.tool_calls),
        action_tokens=message.action_tokens,
        response_tokens=sum(len(segment.token_ids) for segment in message.segments[1:]),
        end_reason=message.end_reason,
    )


def _failed_item(number: str, reason: str, lease: OpenLease, memory: Memory) -> ItemResult:
    job = memory.jobs.get(lease.job or "")
    return ItemResult(lease_id=number, failures=job.next_failure(lease.item) if job else 1, end_reason=reason)
