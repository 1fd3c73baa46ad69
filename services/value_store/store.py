"""The one writer: every change of Redis passes here, one at a time.

Memory is what Redis will hold once the change under way is written, and is forgotten if that is in doubt.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np
from redis.asyncio import Redis

from services.value_store import evidence, issuing, sampler
from services.value_store.drift_clock import UnknownVersions
from services.value_store.evidence import Batch, Entry
from services.value_store.issuing import Drawn
from services.value_store.jobs import Job, resumable, surplus
from services.value_store.memory import Memory, load_memory
from services.value_store.pinning import Replica
from services.value_store.pipeline import one_behind_the_other
from services.value_store.posterior import Retention
from services.value_store.prompts import Prior, Prompt, Refused, plan_upsert
from services.value_store.receipts import Receipts
from services.value_store.recent import Recent
from singlestream.config import Config
from singlestream.contracts import Purpose, Sampling, Tombstone, decode_as
from singlestream.contracts.policy_version import PolicyVersion
from singlestream.errors import ContractError, DeadlineExceeded, SinglestreamError, UnknownOutcome
from singlestream.streams.connection import LOST
from singlestream.streams.keys import Keys
from singlestream.streams.ledger import Change, ValueStoreStreams

log = logging.getLogger(__name__)

COLLECT_AFTER_OBJECTS = 100_000
"""More than a few batches of updates hold, which die without Python's collector: it need not walk them."""
PROMPTS_PER_SCRIPT = 1000
"""Prompts that one script writes: a long script holds up everyone."""
ENTRIES_PER_SCRIPT = 768
"""Of a stream, applied at once: some 200 KB, which a socket's buffer takes whole while the next are planned."""


class NotReady(SinglestreamError):
    """The store cannot answer now; the text says what it waits for. Ask again."""


class Store:
    """Memory, the lock of the one writer, and everything that changes Redis.

    Args:
        config: the run's settings.
        redis: a client from `singlestream.streams.connect`.
    """

    def __init__(self, config: Config, redis: Redis) -> None:
        self.config, self.redis = config, redis
        self.keys = Keys(config.run.name)
        self.streams = ValueStoreStreams(redis, self.keys)
        settings = config.value_store
        self.retention = Retention(
            settings.retention,
            settings.rho_constant,
            settings.rho_min,
            settings.rho_max,
            settings.rho_event,
            config.learner.d_half,
        )
        self.rng = np.random.default_rng()
        self.replicas: list[Replica] = []
        self.held: Mapping[Purpose, int] = {}
        """Leases that replicas have taken and not ended, when last looked."""
        self.receipts = Receipts()
        self.memory_full = False
        self.rebuilds = 0
        self.recent = Recent()
        self._memory: Memory | None = None
        self._trouble: str | None = "Redis, for its first answer"
        self._doubt = asyncio.Event()
        self._ready = asyncio.Event()
        self._lock = asyncio.Lock()
        self._doubt.set()

    @property
    def waiting_for(self) -> str | None:
        """What the store waits for before it can write; None when it can."""
        return self._trouble

    @property
    def memory(self) -> Memory:
        """Memory for reading: while Redis is away, as it was last. Raises `NotReady` before it was first read."""
        if self._memory is None:
            raise NotReady(f"the value store waits for {self._trouble}")
        return self._memory

    async def until_ready(self) -> None:
        """Wait until memory mirrors Redis. `keep_ready` bounds the wait: it ends the process at its deadline."""
        await self._ready.wait()

    def doubt(self, error: BaseException) -> None:
        """Stop writing: memory may not be what Redis holds. `keep_ready` reads everything anew."""
        if self._trouble is None and not isinstance(error, asyncio.CancelledError):
            log.warning("memory is forgotten and read again: %s", error)
        self._trouble = f"Redis, to read everything anew ({error})"
        self._ready.clear()
        self._doubt.set()

    async def keep_ready(self) -> None:
        """Read Redis at the start and after every doubt, with backoff. Runs for the life of the process.

        Raises:
            Fenced: another store has taken over.
            DeadlineExceeded: Redis stayed away for ``redis_deadline_s``.
        """
        while True:
            await self._doubt.wait()
            started, pause_s = time.monotonic(), 0.05
            while self._doubt.is_set():
                try:
                    await self._read_anew()
                except (*LOST, UnknownOutcome) as error:
                    waited_s = time.monotonic() - started
                    if waited_s > self.config.value_store.redis_deadline_s:
                        raise DeadlineExceeded(f"Redis, to read the value store's state ({error})", waited_s) from error
                    self._trouble = f"Redis, to read everything anew ({error})"
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, 2.0)

    async def _read_anew(self) -> None:
        started = time.monotonic()
        async with self._lock:
            self._doubt.clear()
            try:
                self._memory = await load_memory(self.streams, self.config)
            except BaseException:
                self._doubt.set()
                raise
            gc.freeze()  # a million prompts need not be walked by every collection; nothing in them is a cycle
            gc.set_threshold(COLLECT_AFTER_OBJECTS)
            self._trouble = None
            self._ready.set()
        self.rebuilds += 1
        seconds = time.monotonic() - started
        log.info("epoch %s: %d prompts read in %.2f s", self._memory.epoch, len(self._memory.table), seconds)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Memory]:
        """The one writer's turn, for what stands in this file and in `evaluations`. Raises `NotReady`."""
        async with self._lock:
            if self._trouble is not None:
                raise NotReady(f"the value store waits for {self._trouble}")
            try:
                yield self.memory
            except (NotReady, Refused):
                raise
            except (*LOST, UnknownOutcome) as error:
                self.doubt(error)
                raise NotReady(f"the change may or may not have been made: {error}; ask again") from error
            except (
                BaseException
            ) as error:  # a cancelled request may have written, a failed plan may have half changed memory
                self.doubt(error)
                raise

    async def commit(self, change: Change) -> None:
        """Write a change, within `writing`."""
        await self.streams.commit(change, self.config.value_store.history_entries)

    async def _take(
        self, stream: str, entries: Sequence[Entry], plan: Callable[[Sequence[Entry], Memory], Batch]
    ) -> None:
        # While Redis writes one part of the stretch, the next is planned on memory as it will be then. Nobody else has
        # the writer's turn before all of it is written, and memory is forgotten if any of it may not have been.
        async with self.writing() as memory, one_behind_the_other() as write:
            while entries:
                part = entries[:ENTRIES_PER_SCRIPT]
                try:
                    batch = plan(part, memory)
                except UnknownVersions as unknown:
                    await self._learn_clock(memory, unknown.versions)
                    batch = plan(part, memory)
                await write(self.commit(batch.change))
                batch.apply(memory)
                self.recent.add(batch.rho, batch.rewards, batch.staleness)
                entries = entries[batch.entries :]

    async def take_updates(self, epoch: str, entries: Sequence[Entry]) -> None:
        """Apply a stretch of ``posterior_updates``, read under that epoch from the cursor on.

        Raises `NotReady` or `Fenced`.
        """
        run = self.config.run
        stream, total = self.keys.posterior_updates, run.total_steps * run.train_batch_size

        def plan(part: Sequence[Entry], memory: Memory) -> Batch:
            self._same(memory, epoch)
            share = self.config.anchor_share
            return evidence.plan_updates(part, stream, memory, self.retention, time.time(), total, share)

        await self._take(stream, entries, plan)

    async def take_results(self, epoch: str, entries: Sequence[Entry]) -> None:
        """Apply a stretch of ``results``, read under that epoch from the cursor on. Raises `NotReady` or `Fenced`."""
        stream, rho_min = self.keys.scored, self.config.value_store.rho_min

        def plan(part: Sequence[Entry], memory: Memory) -> Batch:
            self._same(memory, epoch)
            return evidence.plan_results(part, stream, memory, rho_min, time.time())

        await self._take(stream, entries, plan)

    @staticmethod
    def _same(memory: Memory, epoch: str) -> None:
        if memory.epoch != epoch:
            raise NotReady("memory was read anew since these entries were read")

    def note_version(self, epoch: str, entry: str, data: bytes) -> None:
        """Note a published policy version.

        Entries read under an older epoch are passed over, one that cannot be read is logged.
        """
        memory = self.memory
        if memory.epoch != epoch:
            return
        memory.versions_cursor = entry
        try:
            memory.publish(decode_as(PolicyVersion, data))
        except ContractError as error:
            log.error("policy version in entry %s cannot be read: %s", entry, error)

    async def _learn_clock(self, memory: Memory, versions: set[int]) -> None:
        # An update may arrive before the publication of its version has been read from the other stream.
        found = await self.redis.hmget(self.keys.clock, [str(version) for version in versions])
        for version, z in zip(versions, found, strict=True):
            if z is None:
                log.warning("evidence names version %d, which has no z: that of an older one is taken", version)
                memory.clock.miss(version)
            else:
                memory.clock.observe(version, float(z))

    async def fetch_prompts(self, ids: Sequence[str]) -> list[Prompt | None]:
        """Texts of prompts, from Redis; None for those it does not hold."""
        if not ids:
            return []
        return [Prompt.unpack(data) if data else None for data in await self.redis.hmget(self.keys.prompts, list(ids))]

    async def upsert(self, prompts: Sequence[Prompt], priors: Sequence[Prior | None]) -> list[str]:
        """Insert prompts, or replace their answer, environment and split; returns their ids.

        A prior is taken where the prompt has no visits yet. A request that ends in `NotReady` may be repeated.
        """
        ids = [prompt.prompt_id for prompt in prompts]
        for start in range(0, len(ids), PROMPTS_PER_SCRIPT):
            part = slice(start, start + PROMPTS_PER_SCRIPT)
            async with self.writing() as memory:
                values = plan_upsert(memory.table, prompts[part], priors[part], time.time())
                texts = {prompt.prompt_id: prompt.pack() for prompt in prompts[part]}
                await self.commit(Change(prompts=texts, values=values))
                memory.table.put(list(values), list(values.values()))
        return ids

    async def create_job(self, job: Job, resume: bool = False) -> Job:
        """Enter a job, or return the one that it `resumable`-s; its items are leased as the replicas' demand allows.

        Raises `Refused` for prompts that are not known.
        """
        async with self.writing() as memory:
            if resume and (same := resumable(memory.jobs.values(), job)):
                return same
            unknown = [prompt_id for prompt_id in job.prompt_ids if prompt_id not in memory.table]
            if unknown:
                raise Refused(f"{len(unknown)} prompts are not known, first {unknown[0]!r}")
            old = surplus(memory.jobs.values(), self.config.value_store.finished_jobs_kept)
            await self.commit(Change(jobs={job.job_id: job.pack()}, dropped_jobs=old))
            memory.jobs[job.job_id] = job
            memory.drop_jobs(old)
        return job

    async def set_training(self, state: str) -> str:
        """Move training to running, paused or stopped; returns its state then: stopping until the end marker stands.

        Raises:
            Refused: training has been stopped or has finished, and the learner has been told so.
        """
        async with self.writing() as memory:
            target = "stopping" if state == "stopped" else state
            if memory.state in ("stopping", "stopped", "finished"):
                if state == "stopped" and memory.state != "finished":
                    return memory.state
                raise Refused(f"training is {memory.state}; that cannot be taken back")
            if memory.state != target:
                await self.commit(Change(state=target))
                memory.state = target
        log.info("training is %s", target)
        return target

    async def wind_down(self) -> None:
        """One round of an early stop.

        Cancel what no replica has taken; end the stream once every lease has ended in it.
        """
        async with self.writing() as memory:
            if memory.state != "stopping":
                return
            unread = [
                (lease, entry, self._cancelled(memory, lease))
                for lease, entry in await self.streams.unread("train")
                if lease in memory.open["train"]
            ]
            cancelled = await self.streams.cancel("train", unread) if unread else []
            memory.close({("train", "cancelled"): cancelled})
            if await self.streams.end_training("stopped", "stopping", "stopped"):
                memory.state = "stopped"
                log.info("training is stopped; %d leases are with the learner", len(memory.open["train"]))

    @staticmethod
    def _cancelled(memory: Memory, lease: str) -> Tombstone:
        prompt_id = memory.open["train"][lease].prompt_id
        detail = "training was stopped before a replica took it"
        return Tombstone(lease_id=lease, prompt_id=prompt_id, reason="cancelled", detail=detail, attempts=0)

    def training_waits_for(self) -> str | None:
        """What training waits for now; None while leases are issued, and where nothing is to come."""
        state, alive = self.memory.state, bool(self.alive_replicas())
        if state == "stopping":
            held = self.held.get("train", 0)
            return f"{held} leases that replicas hold to end" + ("" if alive else ", and no replica lives to end them")
        if state in ("stopped", "finished"):
            return None
        return self.training_blocked_by() or (None if alive else "a living rollout replica")

    def training_blocked_by(self) -> str | None:
        """Why no training lease is issued now; None where one may be."""
        memory, run = self.memory, self.config.run
        if memory.state != "running":
            return f"training to be set running (it is {memory.state})"
        if memory.newest is None:
            return "the learner's first policy version"
        needed = run.train_batch_size // self.config.value_store.group_size
        if (prompts := issuing.training_prompts(memory.table)) < needed:
            return f"{needed} prompts of split train, one batch (there are {prompts})"
        if self.memory_full:
            return "memory in Redis: its share of maxmemory is used up"
        if (bound := memory.admission.binding) is not None:
            return f"leases to end: the {bound} bound admits no more"
        return None

    def alive_replicas(self) -> list[Replica]:
        """Replicas that have reported lately."""
        now_s = time.time()
        return [replica for replica in self.replicas if replica.alive(now_s)]

    async def issue(self, wanted: int, pinned: int = 0) -> int:
        """Lease episodes; returns how many were issued.

        Args:
            wanted: jobs and training share them.
            pinned: more, for the pinned evaluation under way.
        """
        async with self.writing() as memory:
            share, alive = self.config.rollout.evaluation_share, self.alive_replicas()
            items, held = (
                issuing.items_to_lease(memory, alive, share, wanted, pinned) if not self.memory_full else ([], [])
            )
            may_train = 0 if self.training_blocked_by() else memory.admission.headroom
            for_jobs, for_training = issuing.split_demand(wanted, len(items), may_train)
            issued = await self._issue_items(memory, items[:for_jobs] + held)
            if for_training > 0:
                weight = issuing.training_weights(memory, self.config.value_store, self.retention, self.rng)
                size = self.config.value_store.group_size
                groups = min(-(-for_training // size), memory.admission.headroom // size)
                rows = np.repeat(sampler.draw(weight, groups, self.rng), size)
                sampling = Sampling(temperature=self.config.run.temperature, top_p=1.0, top_k=0)
                drawn = [(memory.table.id(row), None, 0, sampling) for row in rows.tolist()]
                issued += await self._issue_leases(memory, "train", drawn)
        return issued

    async def _issue_items(self, memory: Memory, items: list[tuple[Job, int]]) -> int:
        issued = 0
        for purpose in ("estimate", "evaluate"):
            part = [(job.prompt_of(item), job, item, job.sampling) for job, item in items if job.purpose == purpose]
            issued += await self._issue_leases(memory, purpose, part)
        return issued

    async def _issue_leases(self, memory: Memory, purpose: Purpose, drawn: Sequence[Drawn]) -> int:
        if not drawn:
            return 0
        prompts = await self.fetch_prompts([prompt_id for prompt_id, *_ in drawn])
        mean = self.recent.mean_reward(self.config.run.train_batch_size)
        both = list(zip(drawn, prompts, strict=True))
        leases = issuing.make_leases(memory, purpose, both, mean, self.config.value_store.shrinkage, time.time())
        together = self.config.value_store.group_size if purpose == "train" else 1
        await self.streams.issue(purpose, [(lease, record.pack()) for lease, record in leases], together)
        memory.issued[purpose] += len(leases)
        for lease, record in leases:
            memory.add(lease.lease_id, record)
        return len(leases)
