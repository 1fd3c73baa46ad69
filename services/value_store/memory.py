"""What the store remembers of Redis.

Read as a whole under a fresh epoch, kept in step by the one writer, forgotten after any doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgpack
import numpy as np
from redis.asyncio import Redis

from services.value_store.admission import TRAINING_ENDS, Admission
from services.value_store.calibration import Calibration
from services.value_store.drift_clock import DriftClock
from services.value_store.jobs import ItemResult, Job
from services.value_store.table import Table
from singlestream.config import Config
from singlestream.contracts import Outcome, PolicyVersion, Purpose, decode_as
from singlestream.errors import ContractError, UnknownOutcome
from singlestream.streams.connection import renew_file
from singlestream.streams.ledger import PURPOSES, LedgerCounts, ValueStoreStreams, read_ledger
from singlestream.streams.pins import Pin
from singlestream.streams.training import VERSIONS_KEPT


@dataclass(frozen=True, slots=True)
class OpenLease:
    """An outstanding lease, as its record in Redis says.

    Args:
        prompt_id: its prompt.
        v_hat: baseline frozen at issue.
        version: newest policy version at issue.
        issued_at_s: Unix time.
        job: job that asked for it; None for training.
        item: item of that job.
        row: row of the prompt in the table of this memory; None where it has none. Not in Redis.
    """

    prompt_id: str
    v_hat: float
    version: int
    issued_at_s: float
    job: str | None = None
    item: int = 0
    row: int | None = field(default=None, compare=False)

    def pack(self) -> bytes:
        """As it stands in Redis."""
        fields = (self.prompt_id, self.v_hat, self.version, self.issued_at_s, self.job, self.item)
        return bytes(msgpack.packb(fields, use_bin_type=True))

    @classmethod
    def unpack(cls, data: bytes, table: Table) -> OpenLease:
        """Inverse of `pack`, with the row in that table."""
        prompt_id, v_hat, version, issued_at_s, job, item = msgpack.unpackb(data, raw=False)
        return cls(prompt_id, v_hat, version, issued_at_s, job, item, table.row(prompt_id))


@dataclass(frozen=True)
class PublishedVersion:
    """What the store keeps of a policy version."""

    version: int
    lineage: int
    z: float
    drift: float
    published_at_s: float

    @classmethod
    def of(cls, message: PolicyVersion) -> PublishedVersion:
        """Leave the manifest behind."""
        return cls(message.version, message.lineage, message.z, message.drift, message.published_at_s)


class Memory:
    """Mirror of Redis within one epoch.

    Attributes:
        epoch: the store's token and the middle part of the lease numbers given out from this memory.
        redis_run_id: Redis' own number of its process, to notice a restart.
        issued: purpose → last n of a lease number.
    """

    def __init__(self, epoch: str, redis_run_id: str, admission: Admission) -> None:
        self.epoch, self.redis_run_id, self.admission = epoch, redis_run_id, admission
        self.table = Table()
        self.clock = DriftClock()
        self.open: dict[Purpose, dict[str, OpenLease]] = {purpose: {} for purpose in PURPOSES}
        self.leased: dict[Purpose, int] = dict.fromkeys(PURPOSES, 0)
        self.ended: dict[Purpose, dict[Outcome, int]] = {purpose: {} for purpose in PURPOSES}
        self.duplicates = self.jobs_dropped = self.dead_letters_dropped = 0
        self.on_clock = 0
        self.cursors: dict[str, str] = {}
        self.versions: deque[PublishedVersion] = deque(maxlen=VERSIONS_KEPT)
        self.versions_cursor = "0-0"
        self.jobs: dict[str, Job] = {}
        self.pin: Pin | None = None
        self.calibration = Calibration()
        self.state = "paused"
        self.issued: dict[Purpose, int] = dict.fromkeys(PURPOSES, 0)

    def close(self, closes: Mapping[tuple[Purpose, Outcome], Sequence[str]]) -> None:
        """Take leases that have ended out of the books."""
        for (purpose, outcome), leases in closes.items():
            ended = [self.open[purpose].pop(lease) for lease in leases]
            self.ended[purpose][outcome] = self.ended[purpose].get(outcome, 0) + len(leases)
            if purpose == "train":
                np.subtract.at(self.table.in_flight, [one.row for one in ended if one.row is not None], 1)
                self.admission.end(outcome, len(leases))

    def drop_jobs(self, job_ids: Sequence[str]) -> None:
        """Forget finished jobs."""
        for job_id in job_ids:
            del self.jobs[job_id]
        self.jobs_dropped += len(job_ids)

    def add(self, lease: str, record: OpenLease) -> None:
        """Enter a lease that has been issued."""
        purpose: Purpose = lease.split(":", 1)[0]  # type: ignore[assignment]
        self.open[purpose][lease] = record
        self.leased[purpose] += 1
        if purpose == "train":
            self.admission.issue(1)
            if record.row is not None:
                self.table.in_flight[record.row] += 1
        elif record.job in self.jobs:
            self.jobs[record.job].lease(record.item)

    def ledger(self) -> dict[Purpose, LedgerCounts]:
        """The ledger as this memory has it."""
        return {
            purpose: LedgerCounts(self.leased[purpose], len(self.open[purpose]), dict(self.ended[purpose]))
            for purpose in PURPOSES
        }

    def publish(self, message: PolicyVersion) -> None:
        """Note a published version."""
        self.versions.append(PublishedVersion.of(message))
        self.clock.publish(message.version, message.z)

    @property
    def training_ended(self) -> bool:
        """Whether the learner has nothing left to do: finished, or stopped with every training lease ended."""
        return self.state == "finished" or (self.state == "stopped" and not self.open["train"])

    @property
    def newest(self) -> PublishedVersion | None:
        """The version published last: after a rollback a lower number than before. None before the first."""
        return self.versions[-1] if self.versions else None


async def load_memory(streams: ValueStoreStreams, config: Config) -> Memory:
    """Take a new epoch and read everything. Nobody else writes meanwhile: the fence is ours.

    Raises:
        Fenced: another store has taken over.
        UnknownOutcome: Redis holds records that contradict each other.
    """
    run, redis, keys = config.run, streams.redis, streams.keys
    epoch = await streams.take_over()
    await renew_file(redis)
    info = await redis.info("server")
    group_size = config.value_store.group_size
    admission = Admission(run.train_batch_size, run.max_staleness, run.total_steps, group_size)
    memory = Memory(epoch, str(info["run_id"]), admission)
    async for batch in streams.scan(keys.values):
        memory.table.put([prompt_id.decode() for prompt_id, _ in batch], [record for _, record in batch])
        await asyncio.sleep(0)
    await _load_versions(memory, redis, keys.clock, keys.policy_versions)
    await _load_jobs(memory, streams)
    await _load_ledger(memory, redis, streams)
    state, calibration, pin = await redis.mget(keys.state, keys.calibration, keys.pin)
    memory.pin = Pin.parse(pin)
    memory.state = state.decode() if state else config.value_store.training
    if memory.state == "finished" and not memory.admission.finished:
        memory.state = "paused"  # total_steps was raised since
    memory.calibration = Calibration(calibration)
    cursors = await redis.hgetall(keys.cursors)
    memory.cursors = {stream.decode(): entry.decode() for stream, entry in cursors.items()}
    return memory


async def _load_versions(memory: Memory, redis: Redis, clock: str, stream: str) -> None:
    z = await redis.hgetall(clock)
    memory.clock = DriftClock({int(version): float(value) for version, value in z.items()})
    entries = await redis.xrevrange(stream, count=VERSIONS_KEPT)
    for entry, fields in reversed(entries):
        memory.versions_cursor = entry.decode()
        with contextlib.suppress(ContractError):
            memory.publish(decode_as(PolicyVersion, fields.get(b"m", b"")))


async def _load_jobs(memory: Memory, streams: ValueStoreStreams) -> None:
    keys = streams.keys
    async for batch in streams.scan(keys.jobs):
        for _, data in batch:
            job = Job.unpack(data)
            memory.jobs[job.job_id] = job
    for job in memory.jobs.values():
        if job.finished_at_s is None:
            async for batch in streams.scan(keys.job_results(job.job_id)):
                for item, data in batch:
                    job.record(int(item), ItemResult(**msgpack.unpackb(data, raw=False)))


async def _load_ledger(memory: Memory, redis: Redis, streams: ValueStoreStreams) -> None:
    ledger = await read_ledger(redis, streams.keys)
    for purpose, counts in ledger.items():
        if not counts.adds_up:
            raise UnknownOutcome(f"the ledger of {purpose} does not add up in Redis: {counts}")
        memory.leased[purpose] = counts.leased - counts.outstanding
        memory.ended[purpose] = dict(counts.ended)
    ended = ledger["train"].ended
    memory.admission.leased = memory.leased["train"]
    memory.admission.ended = {outcome: ended[outcome] for outcome in TRAINING_ENDS}
    counts = await redis.hmget(streams.keys.ledger, ["duplicates", "jobs_dropped", "dead_letters_dropped"])
    memory.duplicates, memory.jobs_dropped, memory.dead_letters_dropped = (int(count or 0) for count in counts)
    for purpose in PURPOSES:
        async for batch in streams.scan(streams.keys.outstanding(purpose)):
            for lease, record in batch:
                if (number := lease.decode()) not in memory.open[purpose]:
                    _restore(memory, number, OpenLease.unpack(record, memory.table))


def _restore(memory: Memory, lease: str, record: OpenLease) -> None:
    # A run whose settings were made smaller may hold more leases than it would now issue, so admission is not asked.
    purpose: Purpose = lease.split(":", 1)[0]  # type: ignore[assignment]
    if purpose == "train":
        memory.admission.leased += 1
        if record.row is not None:
            memory.table.in_flight[record.row] += 1
    elif record.job in memory.jobs:
        memory.jobs[record.job].lease(record.item)
    memory.open[purpose][lease] = record
    memory.leased[purpose] += 1
