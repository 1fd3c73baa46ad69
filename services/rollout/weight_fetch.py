"""Bring a version's weight file to this machine over HTTP: once a machine, as a delta where that leads there.

The file lands in a folder of the same memory volume that a learner on this machine would use, so loading it is the same
from there on. It gets its name only when every checksum is right; until then it is ``*.partial``, and a connection that
breaks goes on where it broke, also in another process.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.rollout.manifest import OpenWeights, open_weights
from services.rollout.metrics import Metrics
from singlestream.checksums import file_crc32
from singlestream.config import RunConfig
from singlestream.contracts import PolicyVersion, WeightDelta
from singlestream.errors import DeadlineExceeded, WeightsError
from singlestream.weight_delta import apply_delta
from singlestream.weight_files import (
    PARTIAL,
    delta_etag,
    delta_name,
    remove_older,
    weights_etag,
    weights_name,
)

log = logging.getLogger(__name__)

FOLDER = "fetched"
"""Inside the run's folder on the memory volume: what HTTP brought never mixes with what a learner wrote there."""
ATTEMPTS = 5
"""In a row without a byte of progress; then the version is given up, and the newest one looked for."""
BACKOFF_S = 0.25
TIMEOUT_S = 30.0
"""Without a byte for so long the connection counts as broken."""
SLOWEST_BYTES_PER_S = 1e6
"""A download may take ``rollout.weights_timeout_s`` and what its bytes take at this rate."""
POLL_S = 0.05


class Stopped(WeightsError):
    """The replica is stopping: the fetch was left where it was."""


@dataclass(frozen=True)
class Fetched:
    """A version's file on this machine.

    Args:
        version: with the manifest's path on this machine.
        checked: its checksums have just been found right.
    """

    version: PolicyVersion
    checked: bool


@contextmanager
def checked_weights(version: PolicyVersion, fetcher: WeightFetcher | None) -> Iterator[OpenWeights]:
    """A version's file, held open, its checksums right. Blocks: enter it in a thread.

    The file that the manifest names is taken where it lies on this machine; else, or if it is damaged, it is fetched.

    Args:
        version: what is wanted.
        fetcher: None where this replica only reads the memory volume.

    Raises:
        FileNotFoundError: newer versions have replaced it.
        WeightsError: its bytes are damaged and cannot be fetched.
        DeadlineExceeded: the download, or that of another replica of this machine, took too long.
    """
    if version.manifest.remote is None:
        fetcher = None
    found = Fetched(version, checked=False)
    if fetcher is not None and not Path(version.manifest.path).is_file():
        found = fetcher.fetch(version)
    with ExitStack() as stack:
        weights = stack.enter_context(open_weights(found.version.manifest))
        try:
            if not found.checked:
                weights.check_bytes()
        except WeightsError as error:
            if fetcher is None:
                raise
            log.warning("%s; fetching it", error)
            manifest = fetcher.fetch(version, trusted=False).version.manifest
            weights = stack.enter_context(open_weights(manifest))
        yield weights


class WeightFetcher:
    """Fetches for one replica. Blocks: call it in a thread.

    Args:
        run: weights folder and token.
        metrics: of the replica.
        timeout_s: longest wait for another replica of this machine that is fetching, and for a file of no bytes.
    """

    def __init__(self, run: RunConfig, metrics: Metrics, timeout_s: float) -> None:
        self.folder = run.weights_path / FOLDER
        self.metrics, self.timeout_s = metrics, timeout_s
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the replica stops: asked while a fetch runs or waits."""
        self._learners = run.weights_path
        token = run.weights_token
        self._headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}

    def fetch(self, version: PolicyVersion, trusted: bool = True) -> Fetched:
        """Have the version's file here.

        Args:
            version: whose manifest names where to fetch it.
            trusted: False if a file that lay here was found damaged: nothing that lies here is used.

        Raises:
            WeightsError: it cannot be had, or what came is not what the manifest says; nothing is left behind.
            DeadlineExceeded: the download took too long; what came stays, and the next fetch of this version goes on
                there. Or that of another replica of this machine did.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / weights_name(version.version, version.lineage)
        here = version.model_copy(
            update={"manifest": version.manifest.model_copy(update={"path": str(target.absolute())})}
        )
        with self._lock():
            if trusted and target.is_file():
                return Fetched(here, checked=False)
            started = time.monotonic()
            try:
                kind = self._make(here, target, trusted)
                remove_older(self.folder, keep={target.name})
            except OSError as error:
                raise WeightsError(f"{target}: {error}; three versions of the weights must fit there") from error
        self.metrics.fetches.labels(kind).inc()
        self.metrics.fetch_seconds.observe(time.monotonic() - started)
        return Fetched(here, checked=True)

    def _make(self, here: PolicyVersion, target: Path, trusted: bool) -> str:
        """Make the file: by deltas if they lead there from what is here, else whole. Returns which it was."""
        if trusted and (path := self._path_of_deltas(here)) is not None:
            try:
                self._by_deltas(here, target, *path)
            except Stopped:
                raise
            except WeightsError as error:
                log.warning("%s; fetching the whole file instead", error)
            else:
                return "delta"
        beside = target.with_name(target.name + PARTIAL)
        for partial in self.folder.glob("*" + PARTIAL):
            if partial != beside or not trusted:
                partial.unlink()
        manifest = here.manifest
        self._download(here, target.name, beside, manifest.total_bytes, weights_etag(manifest), "full")
        self._finish(here, beside, target)
        return "full"

    def _path_of_deltas(self, here: PolicyVersion) -> tuple[Path, list[WeightDelta]] | None:
        """The newest base that is on this machine, and the deltas that lead from it to this version."""
        assert here.manifest.remote is not None  # noqa: S101  `checked_weights` asks for none other
        deltas = here.manifest.remote.deltas
        for first in range(len(deltas) - 1, -1, -1):
            name = weights_name(deltas[first].base_version, deltas[first].base_lineage)
            for folder in (self.folder, self._learners):
                if (folder / name).is_file():
                    return folder / name, deltas[first:]
        return None

    def _by_deltas(self, here: PolicyVersion, target: Path, base: Path, deltas: list[WeightDelta]) -> None:
        beside = target.with_name(target.name + PARTIAL)
        changes = []
        try:
            for delta in deltas:
                name = delta_name(delta.version, delta.lineage)
                path = self.folder / (name + PARTIAL)
                changes.append(path)
                self._download(here, name, path, delta.nbytes, delta_etag(delta), "delta")
                if file_crc32(path) != delta.crc32:
                    raise WeightsError(f"{name}: checksum differs")
            shutil.copyfile(base, beside)
            if beside.stat().st_size != here.manifest.total_bytes:
                raise WeightsError(f"{base}: not of the layout that the delta is for")
            with beside.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping, memoryview(mapping) as view:
                for path in changes:
                    apply_delta(path, view)
            self._finish(here, beside, target)
        finally:
            beside.unlink(missing_ok=True)
            for path in changes:
                path.unlink(missing_ok=True)

    def _finish(self, here: PolicyVersion, beside: Path, target: Path) -> None:
        """Give a file its name if every checksum is right; else it goes."""
        try:
            with open_weights(here.manifest.model_copy(update={"path": str(beside)})) as weights:
                weights.check_bytes()
        except WeightsError:
            beside.unlink(missing_ok=True)
            raise
        beside.rename(target)

    def _download(self, here: PolicyVersion, name: str, path: Path, nbytes: int, etag: str, kind: str) -> None:
        """Fill a file up to its length, over as many connections as it takes."""
        assert here.manifest.remote is not None  # noqa: S101  `checked_weights` asks for none other
        url = f"{here.manifest.remote.url}/weights/{name}"
        failures, cause = 0, ""
        deadline = _Deadline(f"the {nbytes} bytes of {url}", self.timeout_s + nbytes / SLOWEST_BYTES_PER_S)
        while (have := path.stat().st_size if path.is_file() else 0) < nbytes:
            if failures >= ATTEMPTS:
                raise WeightsError(f"{url}: {ATTEMPTS} attempts without progress, the last: {cause}")
            deadline.check()
            try:
                got = self._receive(url, path, have, nbytes, etag, deadline)
                cause = "" if have + got == nbytes else f"it ended after {have + got} of {nbytes} bytes"
            except httpx.HTTPError as error:
                got = (path.stat().st_size if path.is_file() else 0) - have
                cause = f"{type(error).__name__}: {error}"
            self.metrics.fetched_bytes.labels(kind).inc(got)
            failures = 0 if got else failures + 1
            if cause:
                log.warning("fetching %s: %s", url, cause)
                self._wait(BACKOFF_S * 2**failures)
        if path.stat().st_size > nbytes:
            path.unlink()
            raise WeightsError(f"{url}: longer than the {nbytes} bytes of its manifest")

    def _receive(self, url: str, path: Path, have: int, nbytes: int, etag: str, deadline: _Deadline) -> int:
        """One request for the bytes from ``have`` on; returns how many came.

        Raises:
            WeightsError: the learner does not have this file, or refuses; asking again is of no use.
            httpx.HTTPError: the connection broke, or the learner is busy; what had come is in the file.
            DeadlineExceeded: likewise.
        """
        headers = {**self._headers, "If-Match": etag, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with (
            httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client,
            client.stream("GET", url, headers=headers) as reply,
        ):
            if reply.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                raise httpx.HTTPError("503: the learner serves too many others")
            if reply.status_code != (httpx.codes.PARTIAL_CONTENT if have else httpx.codes.OK):
                raise WeightsError(f"{url}: {reply.status_code} {reply.reason_phrase}")
            got = 0
            with path.open("ab") as file:
                for part in reply.iter_raw():  # as it comes: what is gathered is lost when the connection breaks
                    self._go_on()
                    deadline.check()
                    file.write(part)
                    got += len(part)
                    if have + got > nbytes:
                        break
            return got

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One fetch at a time on this machine; the kernel gives the lock back when a process dies."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            started = time.monotonic()
            while not _try_lock(descriptor):
                if time.monotonic() - started > self.timeout_s:
                    raise DeadlineExceeded("another replica of this machine that is fetching weights", self.timeout_s)
                self._wait(POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _wait(self, seconds: float) -> None:
        """Sleep, unless the replica stops."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._go_on()
            time.sleep(min(POLL_S, left))

    def _go_on(self) -> None:
        if self.stopping():
            raise Stopped(f"{self.folder}: the replica stops")


class _Deadline:
    """A point in time from now on, and what is waited for until then."""

    def __init__(self, waited_for: str, seconds: float) -> None:
        self.waited_for, self.seconds = waited_for, seconds
        self._ends = time.monotonic() + seconds

    def check(self) -> None:
        """Raise `DeadlineExceeded` once it has passed."""
        if time.monotonic() > self._ends:
            raise DeadlineExceeded(self.waited_for, self.seconds)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
