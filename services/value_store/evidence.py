"""From entries of the streams to one atomic change.

Which leases end how, and what that does to values, jobs and histories.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.value_store import posterior
from services.value_store.admission import TRAINING_ENDS
from services.value_store.calibration import Calibration
from services.value_store.jobs import ItemResult
from services.value_store.memory import Memory, OpenLease
from services.value_store.posterior import Floats, Retention
from singlestream.contracts import Closing, Message, Tombstone, Trajectory
from singlestream.contracts.posterior_update import EVIDENCE
from singlestream.errors import ContractError
from singlestream.streams.anchors import is_anchored
from singlestream.streams.ledger import Change


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of a stream.

    Args:
        number: the entry's own.
        lease: the lease number beside the message: readable even where the message is damaged.
        data: the message as it came.
        message: the same decoded, or why it cannot be.
    """

    number: str
    lease: bytes
    data: bytes
    message: Closing | Message | ContractError


Decode = Callable[[bytes], Closing | Message]
"""`decode` or `decode_closing`; either raises `ContractError`."""
_Message = Closing | Trajectory | Tombstone
_M = TypeVar("_M", bound=_Message)
_Counted = tuple[Closing, OpenLease]
"""An update that is evidence, and its lease, whose prompt is in the table."""

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
_pack = msgspec.msgpack.Encoder().encode


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
        on_clock: updates under ``kl`` for which the drift clock stood in, since their anchor was evicted or missing.
    """

    change: Change
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    columns: dict[str, Floats | NDArray[np.int64]] = field(default_factory=dict)
    calibration: Calibration | None = None
    entries: int = 0
    rho: Floats = field(default_factory=lambda: np.empty(0))
    rewards: Floats = field(default_factory=lambda: np.empty(0))
    staleness: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    on_clock: int = 0

    def apply(self, memory: Memory) -> None:
        """Bring memory to where Redis now is."""
        for name, values in self.columns.items():
            getattr(memory.table, name)[self.rows] = values
        memory.close(self.change.closes)
        memory.duplicates += self.change.duplicates
        memory.on_clock += self.on_clock
        if self.calibration is not None:
            memory.calibration = self.calibration
        if self.change.stream:
            memory.cursors[self.change.stream] = self.change.after
        if self.change.state is not None:
            memory.state = self.change.state


def decode_entries(raw: Sequence[tuple[str, bytes, bytes]], decode: Decode) -> list[Entry]:
    """Entries of `ValueStoreStreams.read_stream`, decoded. A pure function, so it may run ahead of the writing."""

    def read(data: bytes) -> Closing | Message | ContractError:
        try:
            return decode(data)
        except ContractError as error:
            return error

    return [Entry(number, lease, data, read(data)) for number, lease, data in raw]


def _usable(
    entries: Sequence[Entry], kinds: tuple[type[_M], ...], open_: Mapping[str, OpenLease], change: Change
) -> Iterator[tuple[int, _M, OpenLease]]:
    """Messages that name an outstanding lease and its prompt, each lease once, with their place among the entries.

    Duplicates are counted, and what cannot be used becomes a dead letter.

    Args:
        entries: in stream order.
        kinds: messages that belong into this stream.
        open_: outstanding leases that end in it.
        change: takes the rest.
    """
    source, closed = change.stream or "", set[str]()
    for place, entry in enumerate(entries):
        message = entry.message
        if not isinstance(message, kinds):
            _set_aside(entry, closed, open_, change)
            continue
        number = message.lease_id
        lease = open_.get(number)
        if reason := _misplaced(message, number):
            change.dead_letters.append((source, number, reason, entry.data))
        elif lease is None or number in closed:
            change.duplicates += 1
        elif message.prompt_id != lease.prompt_id and not (message.prompt_id == "" and _fails(message)):
            reason = f"the lease is for prompt {lease.prompt_id}, the message names {message.prompt_id!r}"
            change.dead_letters.append((source, number, reason, entry.data))
        else:
            closed.add(number)
            yield place, message, lease


def _set_aside(entry: Entry, closed: set[str], open_: Mapping[str, OpenLease], change: Change) -> None:
    """Make a dead letter of what is no message of this stream, and end the lease of a damaged one as failed."""
    number, damaged = entry.lease.decode(errors="replace"), isinstance(entry.message, ContractError)
    reason = str(entry.message)[:2000] if damaged else f"a {type(entry.message).__name__} does not belong here"
    change.dead_letters.append((change.stream or "", number, reason, entry.data))
    if damaged and number not in closed and number in open_:
        closed.add(number)  # its end has been written, however badly: nobody will write another
        change.close(number, "failed")


def _misplaced(message: _Message, number: str) -> str:
    """Why a message cannot end the lease that it names; empty where it can."""
    trains = number.startswith("train:")
    if isinstance(message, Closing):
        if not trains or message.outcome not in TRAINING_ENDS:
            return f"no update closes {number} as {message.outcome}"
    elif trains:
        return "the result of a training lease belongs to the learner"
    return ""


def _fails(message: _Message) -> bool:
    return isinstance(message, Tombstone) or (isinstance(message, Closing) and message.outcome == "failed")


def plan_updates(
    entries: Sequence[Entry],
    stream: str,
    memory: Memory,
    retention: Retention,
    now_s: float,
    total: int,
    anchor_share: float = 0.0,
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
        anchor_share: share of the prompts whose previous response is kept.

    Raises:
        UnknownVersions: look these up, then plan again.
    """
    taken, seen = len(entries), set[int]()
    counted: list[_Counted] = []
    change = Change(stream=stream, before=memory.cursors.get(stream, "0-0"))
    for place, update, lease in _usable(entries, (Closing,), memory.open["train"], change):
        if update.outcome in EVIDENCE and lease.row is not None:
            if lease.row in seen:
                taken = place
                break
            seen.add(lease.row)
            counted.append((update, lease))
        change.closes["train", update.outcome].append(update.lease_id)
    if anchor_share:
        change.anchors = [(u.prompt_id, u.lease_id) for u, _ in counted if is_anchored(u.prompt_id, anchor_share)]
    memory.clock.require({update.version for update, _ in counted if update.version is not None})
    change.after = entries[taken - 1].number
    batch = Batch(change, entries=taken)
    if counted:
        _revise(batch, counted, memory, retention, now_s)
    ended = Counter(memory.ended["train"])
    ended.update({outcome: len(leases) for (_, outcome), leases in change.closes.items()})
    if memory.admission.completed(ended) >= total and memory.state in ("running", "paused"):
        change.state = "finished"
    return batch


def _revise(batch: Batch, counted: Sequence[_Counted], memory: Memory, retention: Retention, now_s: float) -> None:
    """New posteriors, records and histories of the prompts that have evidence."""
    updates, leases = zip(*counted, strict=True)
    table, rows = memory.table, np.array([lease.row for lease in leases], np.int64)
    reward = np.array([update.reward for update in updates], np.float64)
    version = np.array([update.version for update in updates], np.int64)
    at_lease = [lease.v_hat for lease in leases]
    drift = np.array([update.kl for update in updates], np.float64)  # NaN for None
    z, z_last, version_last = memory.clock.lookup(version), table.z_last[rows], table.version[rows]
    kl = np.where(table.visits[rows] == 0, 0.0, drift)  # R: a first visit has no drift
    rho = retention.rho(z, z_last, version, version_last, kl)
    if retention.mode == "kl":
        batch.on_clock = int(np.isnan(kl).sum())
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
    ids = [lease.prompt_id for lease in leases]
    batch.change.values = dict(zip(ids, table.records(rows, **batch.columns), strict=True))
    said = ([getattr(update, name) for update in updates] for name in ("lease_id", "outcome", "version", "reward"))
    found = (column.tolist() for column in (rho, before, posterior.v_hat(alpha, beta), alpha + beta, z))
    records = map(_pack, zip(*said, *found, at_lease, repeat(now_s)))
    batch.change.history = list(zip(ids, records, strict=True))
    batch.calibration = memory.calibration.with_evidence(np.array(at_lease), reward)
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
    change = Change(stream=stream, before=memory.cursors.get(stream, "0-0"), after=entries[-1].number)
    ended: list[tuple[OpenLease, ItemResult]] = []
    kinds: tuple[type[Trajectory | Tombstone], ...] = (Trajectory, Tombstone)
    open_ = ChainMap(memory.open["estimate"], memory.open["evaluate"])
    for _, message, lease in _usable(entries, kinds, open_, change):
        change.close(message.lease_id, "scored" if isinstance(message, Trajectory) else "failed")
        ended.append((lease, _item_result(message, lease, memory)))
    memory.clock.require(result.version for _, result in ended if result.version is not None)
    known = {result.lease_id for _, result in ended}
    for number in chain.from_iterable(change.closes.values()):
        if number not in known:  # closed because its message was damaged
            ended.append((open_[number], _failed_item(number, "malformed", open_[number], memory)))
    priors: dict[int, tuple[float, float, float, int]] = {}
    for lease, result in ended:
        job = memory.jobs.get(lease.job or "")
        if job is None or job.finished_at_s is not None:
            continue
        job.record(lease.item, result)
        change.job_results.setdefault(job.job_id, {})[str(lease.item)] = result.pack()
        if job.purpose == "estimate" and (rewards := job.offline_rewards(lease.item)) is not None and len(rewards):
            row = lease.row
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
        answer=message.answer,
        end_reason=message.end_reason,
    )


def _failed_item(number: str, reason: str, lease: OpenLease, memory: Memory) -> ItemResult:
    job = memory.jobs.get(lease.job or "")
    return ItemResult(lease_id=number, failures=job.next_failure(lease.item) if job else 1, end_reason=reason)
