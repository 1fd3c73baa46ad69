"""Keeps warm zygotes: starts them, proves them with canaries, replaces them, and picks one for each run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from services.sandbox_gateway import mends, policy
from services.sandbox_gateway.faults import IsolationUnavailable, SandboxFault, fault_of
from services.sandbox_gateway.tiers import Tier, TierChoice, tiers_for
from services.sandbox_gateway.view import Interpreter
from services.sandbox_gateway.zygote_process import ZygoteProcess

log = logging.getLogger("singlestream.sandbox")

MAX_FAILED_STARTS = 5
"""Consecutive failures to bring a zygote up after which the gateway gives up, for its supervisor to see."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 2.0
DRAIN_DEADLINE_S = 90.0
"""A replaced zygote may finish its runs: the longest time-out, and some."""


class ZygotePool:
    """The zygotes in service.

    Args:
        interpreter: the sandbox's Python.
        preload: modules to keep warm.
        secret_path: a file that this process can read, for the canary that must not.
        spares: jails that each zygote keeps open ahead of requests.
        recycle_runs: runs after which a zygote is replaced.
        recycle_s: age after which a zygote is replaced.
        on_start: told (kind, reason) at every start of a zygote, for metrics.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        preload: tuple[str, ...],
        secret_path: str,
        spares: int,
        recycle_runs: int,
        recycle_s: float,
        on_start: Callable[[str, str], None] = lambda kind, reason: None,
    ) -> None:
        self._interpreter = interpreter
        self._secret_path = secret_path
        self._spares = spares
        self._recycle_runs = recycle_runs
        self._recycle_s = recycle_s
        self._on_start = on_start
        self.tiers = tiers_for(preload)
        """Kinds that are kept."""
        self._choice = TierChoice(self.tiers)
        self._current: dict[str, ZygoteProcess] = {}
        self._changed = asyncio.Condition()
        self._keepers: list[asyncio.Task[None]] = []
        self._retiring: set[asyncio.Task[None]] = set()
        self.failure: str | None = None
        """Why the last start of a zygote failed. None after a start that worked."""
        self.unfit = False
        """Whether the pool has given up because of what the host is."""

    @property
    def states(self) -> dict[str, str]:
        """Kind → ``ready`` or ``starting``."""
        return {tier.name: "ready" if self._usable(tier.name) else "starting" for tier in self.tiers}

    async def start(self, every_kind: bool = False) -> None:
        """Bring zygotes up.

        Args:
            every_kind: all of them; else only ``plain``, which can run everything.

        Raises:
            IsolationUnavailable: this host does not isolate.
            SandboxFault: one did not come up, though it may the next time.
        """
        for tier in self.tiers if every_kind else self.tiers[:1]:
            self._current[tier.name] = await self._bring_up(tier, "first")

    async def keep(self) -> None:
        """Bring up the kinds that are missing, and keep all of them in service, for ever.

        Raises:
            IsolationUnavailable: a kind of zygote could never be brought up, and that will not change.
            SandboxFault: one could not be brought up (any more), though it may be in another process.
        """
        self._keepers = [asyncio.create_task(self._keep(tier), name=f"keep {tier.name}") for tier in self.tiers]
        await asyncio.gather(*self._keepers)

    async def pick(self, code: str, deadline_s: float) -> ZygoteProcess:
        """A zygote for a snippet; waits while none is in service.

        Raises:
            TimeoutError: none came up within the deadline.
        """
        ranking = self._choice.ranking(code)
        async with asyncio.timeout(deadline_s), self._changed:
            while True:
                for name in ranking:
                    if self._usable(name):
                        return self._current[name]
                await self._changed.wait()

    async def stop(self) -> None:
        """End all zygotes; their runs are lost."""
        tasks = [*self._keepers, *self._retiring]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(zygote.stop() for zygote in self._current.values()))
        self._current.clear()

    def _usable(self, name: str) -> bool:
        return name in self._current and not self._current[name].gone.is_set()

    async def _keep(self, tier: Tier) -> None:
        """Keep one kind in service for ever: replace it when it dies, and before it is old."""
        reason = "first"
        while True:
            if not self._usable(tier.name) or reason == "recycle":
                await self._install(await self._bring_up(tier, reason))
            reason = await self._until_replaced(self._current[tier.name])

    async def _install(self, fresh: ZygoteProcess) -> None:
        old = self._current.get(fresh.tier.name)
        async with self._changed:
            self._current[fresh.tier.name] = fresh
            self._changed.notify_all()
        if old is not None:
            task = asyncio.create_task(_retire(old), name=f"retire {old.tier.name}")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _until_replaced(self, zygote: ZygoteProcess) -> str:
        """Wait until a zygote is due for replacement and say why."""
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await zygote.gone.wait()
                log.warning("zygote %s is gone: %s", zygote.tier.name, zygote.said() or "it said nothing")
                return "died"
            except TimeoutError:
                age_s = asyncio.get_running_loop().time() - zygote.started_at_s
                if zygote.runs_started >= self._recycle_runs or age_s >= self._recycle_s:
                    return "recycle"

    async def _bring_up(self, tier: Tier, reason: str) -> ZygoteProcess:
        """Start a zygote, a bounded number of times where the trouble may pass.

        A host that has isolated before is not given up for good here: another process finds out whether it still does.
        """
        failures = 0
        while True:
            try:
                fresh = await self._start_proven(tier, reason)
            except SandboxFault as fault:
                failures += 1
                unfit = isinstance(fault, IsolationUnavailable)
                self.failure = f"zygote {tier.name}: {fault}: {mends.mend(str(fault))}"
                log.error("start %d of %d failed: %s", failures, MAX_FAILED_STARTS, self.failure)
                if failures == MAX_FAILED_STARTS or (unfit and reason == "first"):
                    self.unfit = unfit
                    kind = IsolationUnavailable if unfit and reason == "first" else SandboxFault
                    raise kind(self.failure) from fault
            else:
                self.failure = None
                return fresh
            await asyncio.sleep(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**failures))

    async def _start_proven(self, tier: Tier, reason: str) -> ZygoteProcess:
        """Start a zygote and let it pass the canaries."""
        self._on_start(tier.name, reason)
        zygote = None
        try:
            zygote = await ZygoteProcess.start(tier, self._interpreter, policy.compile_bpf(), self._spares)
            # Imported here, as it takes as long as the first zygote takes to warm up.
            from services.sandbox_gateway.canaries import failing_canaries

            wrong = await failing_canaries(zygote, self._secret_path)
            if wrong:
                raise IsolationUnavailable("; ".join(wrong))
            await zygote.spares.fill()
        except BaseException as error:
            if zygote is not None:
                await zygote.stop()
            if isinstance(error, OSError):
                raise fault_of("it could not be started", str(error)) from error
            raise
        return zygote


async def _retire(zygote: ZygoteProcess) -> None:
    """Let a replaced zygote finish its runs, then end it."""
    zygote.spares.close()
    try:
        async with asyncio.timeout(DRAIN_DEADLINE_S):
            await zygote.drained()
    except TimeoutError:
        log.warning("zygote %s still had %d runs after %.0f s", zygote.tier.name, zygote.live_runs, DRAIN_DEADLINE_S)
    finally:
        await zygote.stop()
