"""Keep an engine on the newest published policy.

Versions compare as (version, lineage), and only what compares greater is loaded. Everything that can be wrong with a
version is found before the engine is touched; after that an error means a half-loaded engine, and the replica ends
(`generation.EngineDead`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from redis.asyncio import Redis

from services.rollout.manifest import ModelTensors, check_manifest
from services.rollout.metrics import Metrics
from services.rollout.weight_fetch import WeightFetcher, checked_weights
from singlestream.config import RolloutConfig
from singlestream.contracts import PolicyVersion, decode_as
from singlestream.errors import ContractError, DeadlineExceeded, WeightsError
from singlestream.streams import LOST, Keys

log = logging.getLogger(__name__)

POLL_MS = 500
RETRY_S = 1.0
"""Pause after a version that could not be used, or while Redis is away."""


class SwapsWeights(Protocol):
    """What keeping the weights needs of an engine (see `engine.VllmEngine`)."""

    held: tuple[int, int]

    async def swap_weights(self, update: dict[str, Any], version: int, lineage: int, clear_cache: bool) -> float:
        """Load a checked file; returns the seconds for which generation stood still."""
        ...


class WeightsHeld(Exception):
    """A lease needs a newer policy than the one that a pinned evaluation holds: it belongs to another replica."""


def newest_of(entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> tuple[str, PolicyVersion | None, int]:
    """Pick the version to look at from entries of the version stream, oldest first and at least one.

    Returns:
        the last entry's number, the greatest readable version (None if none is), and how many versions are passed over
        for it.
    """
    readable = []
    for entry, fields in entries:
        try:
            readable.append(decode_as(PolicyVersion, fields[b"m"]))
        except ContractError as error:
            log.error("version entry %s is unusable: %s", entry.decode(), error)
    newest = max(readable, key=lambda one: (one.version, one.lineage), default=None)
    return entries[-1][0].decode(), newest, max(0, len(readable) - 1)


def _before(entry: str) -> str:
    """The greatest number that is less than an entry's."""
    ms, _, number = entry.partition("-")
    return f"{ms}-{int(number) - 1}" if int(number) else f"{int(ms) - 1}-{2**64 - 1}"


class WeightKeeper:
    """Watches the version stream and loads what is newer.

    Args:
        redis: a client from `singlestream.streams.connect`.
        keys: keys of the run.
        engine: whose weights are kept.
        model: tensors that a version must consist of.
        settings: ``clear_cache`` and the time-outs.
        metrics: of this replica.
        fetcher: fetches what is not on this machine; None reads the memory volume alone.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        engine: SwapsWeights,
        model: ModelTensors,
        settings: RolloutConfig,
        metrics: Metrics,
        fetcher: WeightFetcher | None = None,
    ) -> None:
        self.redis, self.keys, self.engine, self.model = redis, keys, engine, model
        self.settings, self.metrics, self.fetcher = settings, metrics, fetcher
        self.published = False
        self.last_error = ""
        self.holding = False
        """Whether a pinned evaluation keeps newer versions from being loaded."""
        self._loading = self._again = self._looked = False
        self._changed = asyncio.Condition()
        self._cursor: str | None = None

    @property
    def held(self) -> tuple[int, int]:
        """(version, lineage) of the engine's weights."""
        return self.engine.held

    @property
    def held_still(self) -> bool:
        """Whether the engine's weights stay what they are: held, and no load under way or, at the start, still to come.

        So an evaluation is never pinned to the model's folder while a published policy waits to be loaded.
        """
        return self._keeps and not self._loading

    @property
    def _keeps(self) -> bool:
        return self.holding and self._looked

    async def refresh(self) -> None:
        """Load the newest version from its file again, even if it is the one that is held."""
        async with self._changed:
            self._again = True
            self._cursor = None

    async def hold(self, holding: bool) -> None:
        """Load nothing from here on, or follow the newest version again. A load under way still ends."""
        async with self._changed:
            self.holding = holding
            self._changed.notify_all()

    @property
    def waiting_for(self) -> str | None:
        """What is missing before a training lease can start; None if nothing is."""
        if self.published:
            return None
        return f"a policy version in stream {self.keys.policy_versions}" + (
            f" (last error: {self.last_error})" if self.last_error else ""
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the stream until ``stop`` is set. Raises `EngineDead` after a failed update."""
        if self.fetcher is not None:
            self.fetcher.stopping = stop.is_set
        while not stop.is_set():
            if self._keeps:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), POLL_MS / 1000)
                continue
            try:
                entries = await self._read()
                if entries:
                    await self._consider(entries)
                self._looked = True
            except (WeightsError, DeadlineExceeded, FileNotFoundError) as error:
                self.metrics.updates.labels("refused").inc()
                await self._look_again(error, stop)
            except LOST as error:
                self.metrics.redis_retries.labels("weights").inc()
                await self._look_again(error, stop)

    async def _look_again(self, error: Exception, stop: asyncio.Event) -> None:
        """Tell of an error, and pause."""
        self.last_error = str(error)
        log.warning("weights: %s; looking again in %.0f s", error, RETRY_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), RETRY_S)

    async def _read(self) -> Sequence[tuple[bytes, dict[bytes, bytes]]]:
        """The newest entry at first and to load it again; then what has come since the last that was dealt with."""
        if self._cursor is None:
            entries: Sequence[tuple[bytes, dict[bytes, bytes]]] = await self.redis.xrevrange(
                self.keys.policy_versions, count=1
            )
            if not entries:
                self._cursor = "0-0"
            return entries
        reply = await self.redis.xread({self.keys.policy_versions: self._cursor}, block=POLL_MS)
        return reply[0][1] if reply else []

    async def _consider(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
        if self._keeps:
            return  # since these were read; they are read again afterwards
        cursor, newest, passed_over = newest_of(entries)
        self.metrics.skipped.inc(passed_over)
        self._cursor = _before(cursor)  # after an error the last is read again, and what has come since
        again = self._again and newest is not None and (newest.version, newest.lineage) == self.held
        self._again = False
        if newest is not None and (again or newest.newer_than(self.held)):
            self._loading = True
            try:
                await self._load(newest)
            finally:
                self._loading = False
        if newest is not None:
            async with self._changed:
                self.published = True
                self._changed.notify_all()
        self._cursor = None if self._again else cursor  # asked to load it again meanwhile

    async def _load(self, version: PolicyVersion) -> None:
        """Check a version and swap it in.

        Raises:
            WeightsError: it does not fit the model, its bytes are damaged, or they cannot be fetched; the engine was
                not touched.
            DeadlineExceeded: another replica of this machine fetched for too long; likewise.
            FileNotFoundError: newer versions have replaced its file; the engine was not touched.
            EngineDead: the swap itself failed.
        """
        started = time.monotonic()
        check_manifest(version.manifest, self.model)
        with contextlib.ExitStack() as stack:
            weights = await asyncio.to_thread(stack.enter_context, checked_weights(version, self.fetcher))
            pause_s = await self.engine.swap_weights(
                weights.update, version.version, version.lineage, self.settings.clear_cache
            )
        total_s = time.monotonic() - started
        self.last_error = ""
        self.metrics.updates.labels("loaded").inc()
        self.metrics.pause_seconds.observe(pause_s)
        self.metrics.load_seconds.observe(total_s)
        self.metrics.version.set(version.version)
        self.metrics.lineage.set(version.lineage)
        log.info(
            "weights %d.%d loaded in %.3f s, generation paused for %.3f s",
            version.version,
            version.lineage,
            total_s,
            pause_s,
        )

    async def ensure(self, version: int, lineage: int) -> None:
        """Wait until a published policy of at least ``version``, or of a later lineage, is loaded.

        For version 0 the model folder's weights will do.

        Raises:
            WeightsHeld: a pinned evaluation holds an older one.
            DeadlineExceeded: it was not within ``rollout.weights_timeout_s``; names the version.
        """
        if self.serves(version, lineage):
            return
        timeout_s = self.settings.weights_timeout_s
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.serves(version, lineage) or self.held_still)
        except TimeoutError as error:
            held = "none" if not self.published else f"{self.held[0]}.{self.held[1]}"
            cause = f"policy version {version} (held: {held}; last error: {self.last_error or 'none'})"
            raise DeadlineExceeded(cause, timeout_s) from error
        if not self.serves(version, lineage):
            raise WeightsHeld(f"version {version}.{lineage} is not loaded while a pinned evaluation runs")

    def serves(self, version: int, lineage: int) -> bool:
        """Whether a lease of that policy may start on what is held.

        A later lineage serves any version: the learner went back, and may need this lease to get there again.
        """
        held_version, held_lineage = self.held
        return (held_version >= version or held_lineage > lineage) and (self.published or version == 0)
