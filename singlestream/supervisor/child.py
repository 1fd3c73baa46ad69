"""One service as a child process.

Started, watched with all of its descendants, restarted with backoff, stopped as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from singlestream.errors import DeadlineExceeded, ServiceError

log = logging.getLogger(__name__)

HOPELESS = (2, 78)
"""Exit codes of a wrong setting and of an unfit machine: starting again cannot help; the reason is in the log."""
STABLE_S = 60.0
"""A child that ran so long starts its next backoff from the beginning."""
MAX_RESTARTS = 8
"""Deaths in a row before the run is given up: backoff reaches 30 s, so this is about two minutes."""
STOP_S = 40.0
"""Time to finish cleanly after SIGTERM; a replica hands its episodes over, the learner writes a checkpoint."""
SAY_AFTER_S = 5.0
"""A start that takes longer says what it waits for."""
NO_DIGITS = str.maketrans("", "", "0123456789")
"""What is waited for is told again when it is something else, not when it has got older or larger."""
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Spec:
    """How a service is started and when it counts as ready.

    Args:
        name: name in messages and of the log file.
        command: argument list.
        ready: returns None when ready, else what it waits for.
        env: added to the environment.
        ready_s: deadline for becoming ready.
        completes: whether exit code 0 means that its work is done (the learner) rather than that it died.
    """

    name: str
    command: Sequence[str]
    ready: Callable[[], Awaitable[str | None]]
    env: Mapping[str, str] = field(default_factory=dict)
    ready_s: float = 180.0
    completes: bool = False


class Child:
    """A supervised process.

    `run` keeps it alive until `stop`, completion, or too many deaths in a row.
    """

    def __init__(self, spec: Spec, logs: Path) -> None:
        self.spec = spec
        self.log_path = logs / f"{spec.name}.log"
        self.restarts = 0
        self.completed = False
        self._process: asyncio.subprocess.Process | None = None
        self._family: set[psutil.Process] = set()
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id while it lives."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def run(self) -> None:
        """Start, and start again whenever it dies. Returns when stopped or complete.

        Raises:
            ServiceError: starting it again cannot help (`HOPELESS`), or it died too often in a row.
        """
        deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._run_once()
            if self._stopping.is_set():
                return
            if code == 0 and self.spec.completes:
                self.completed = True
                return
            deaths = 1 if time.monotonic() - started > STABLE_S else deaths + 1
            if code in HOPELESS or deaths > MAX_RESTARTS:
                raise ServiceError(self.spec.name, "exit code " + str(code), self.last_lines())
            pause_s = min(0.1 * 4 ** (deaths - 1), 30.0)
            self._note(f"{self.spec.name} ended with code {code}; starting it again in {pause_s:.1f} s")
            self.restarts += 1
            await self._sleep_unless_stopped(pause_s)

    async def _run_once(self) -> int:
        with self.log_path.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.spec.env},
                start_new_session=True,
                # Should the supervisor itself be killed, its services still get the chance to finish cleanly.
                preexec_fn=lambda: _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        if self._stopping.is_set():  # asked to stop while the process was being made
            self._process.terminate()
        ended = asyncio.ensure_future(self._process.wait())
        while not ended.done():
            self._remember_family()
            await asyncio.wait({ended}, timeout=1.0)
        self._kill_family()
        return ended.result()

    def _note(self, text: str) -> None:
        """Say it here and in the service's own log, where it is looked for in the morning."""
        log.warning(text)
        with contextlib.suppress(OSError), self.log_path.open("a") as output:  # a full disk ends no supervisor
            output.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} supervisor: {text}\n")

    def _remember_family(self) -> None:
        """Note the descendants: those that outlive a killed parent would hold ports, memory and GPUs."""
        try:
            self._family |= set(psutil.Process(self._process.pid).children(recursive=True))  # type: ignore[union-attr]
        except psutil.NoSuchProcess:
            return
        self._family = {process for process in self._family if process.is_running()}

    def _kill_family(self) -> None:
        for process in self._family:
            try:
                if process.is_running():  # compares the start time too: a reused pid is somebody else
                    process.kill()
            except psutil.NoSuchProcess:
                continue
        self._family.clear()

    async def _sleep_unless_stopped(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def wait_ready(self, say: Callable[[str], None]) -> None:
        """Wait until the service is ready; after `SAY_AFTER_S` say every change of what it waits for.

        Raises:
            DeadlineExceeded: it was not ready within its deadline; names the last thing it waited for.
        """
        started, last = time.monotonic(), ""
        while (waiting_for := await self.spec.ready()) is not None:
            if self._stopping.is_set() or self.completed:
                return
            kind = waiting_for.translate(NO_DIGITS)
            if kind != last and time.monotonic() - started > SAY_AFTER_S:
                say(f"{self.spec.name}: waiting for {waiting_for}")
                last = kind
            if time.monotonic() - started > self.spec.ready_s:
                raise DeadlineExceeded(
                    f"{self.spec.name} to be ready ({waiting_for}); see {self.log_path}", self.spec.ready_s
                )
            await asyncio.sleep(0.2)
        say(f"{self.spec.name}: ready after {time.monotonic() - started:.1f} s")

    async def stop(self) -> None:
        """SIGTERM, a bounded wait, then SIGKILL to whatever of its family is left."""
        self._stopping.set()
        process = self._process
        if process is not None and process.returncode is None:
            self._remember_family()
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                log.warning("%s did not stop within %.0f s of SIGTERM; killing it", self.spec.name, STOP_S)
                process.kill()
                await process.wait()
        self._kill_family()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log, for an error's text."""
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()[-count:]
        except OSError:
            lines = []
        return "\n".join([f"last lines of {self.log_path}:", *lines])
