"""Rank 0's publications: snapshots on the loop's thread, everything after that on the background's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from services.learner.publication import NEXT, Snapshot, reserve, seal, take_snapshot, write_delta_file
from services.learner.redis_link import RedisLink
from services.learner.weights_http import WeightFiles
from singlestream.config import Config
from singlestream.contracts import PolicyVersion, RemoteWeights, WeightDelta, WeightManifest
from singlestream.weight_files import (
    KEPT_FILES,
    delta_etag,
    delta_name,
    remove_older,
    weights_crc32,
    weights_etag,
    weights_name,
)

MOST_DELTAS = 8
"""A replica that is further behind fetches the whole file."""


class Publisher:
    """Writes, announces and serves the versions of one lineage.

    Args:
        config: the run's settings.
        lineage: start of the learner.
        link: to Redis.
        files: what HTTP offers; None where weights travel through the memory volume alone.

    Attributes:
        crc32: of the last announced version's weights.
        delta_ratio: bytes of its delta ÷ bytes of its weights; 1 where a delta was not worth it, None where none is
            served.
        seconds: from its snapshot to its announcement.
    """

    def __init__(self, config: Config, lineage: int, link: RedisLink, files: WeightFiles | None) -> None:
        self.folder, self.dtype = config.run.weights_path, config.run.engine_dtype
        self.url = config.learner.weights_url
        self.lineage, self.link, self.files = lineage, link, files
        self.crc32, self.delta_ratio, self.seconds = 0, None if files is None else 1.0, 0.0
        self._published: list[tuple[int, WeightManifest]] = []
        self._deltas: list[WeightDelta] = []
        self._names: list[str] = []
        if self.folder.is_dir():  # what a crash left would be one more than has to fit
            remove_older(self.folder)

    def snapshot(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> Snapshot:
        """Copy the weights as they are now. See `publication.take_snapshot`."""
        return take_snapshot(tensors, self.folder, version, self.lineage, self.dtype)

    def announce(self, snapshot: Snapshot, z: float, drift: float) -> None:
        """Check, describe and announce a snapshot; its bytes, and its delta's, are there before Redis names them.

        Args:
            snapshot: of this version.
            z: the drift clock at this version.
            drift: of this version.

        Raises:
            Fenced: another learner has taken over.
            DeadlineExceeded: Redis was away for too long.
        """
        started = time.monotonic()
        manifest = seal(snapshot)
        if self.files is not None:
            manifest = self._with_deltas(manifest, snapshot.version)
        version = PolicyVersion(
            version=snapshot.version,
            lineage=self.lineage,
            z=z,
            drift=drift,
            manifest=manifest,
            published_at_s=time.time(),
        )
        self.link.call(lambda: self.link.streams.publish(version), f"policy version {snapshot.version}")
        self.link.status.version = snapshot.version
        self.crc32, self.seconds = weights_crc32(manifest), time.monotonic() - started
        self._names = [*self._names, snapshot.final.name][-KEPT_FILES:]
        remove_older(self.folder, keep={*self._names, *(delta_name(one.version, one.lineage) for one in self._deltas)})
        reserve(self.folder, manifest.total_bytes)

    def _with_deltas(self, manifest: WeightManifest, version: int) -> WeightManifest:
        """Write this version's delta, and offer it with all that still leads here."""
        assert self.files is not None and self.url is not None  # noqa: S101  the settings have both or none
        delta = None
        if self._published:
            before, old = self._published[-1]
            delta = write_delta_file(old, (before, self.lineage), manifest, (version, self.lineage))
        self.delta_ratio = 1.0 if delta is None else delta.nbytes / manifest.total_bytes
        self._deltas = [] if delta is None else [*self._deltas, delta][-MOST_DELTAS:]
        while sum(one.nbytes for one in self._deltas) >= manifest.total_bytes:
            self._deltas.pop(0)
        manifest = manifest.model_copy(update={"remote": RemoteWeights(url=self.url, deltas=self._deltas)})
        self._published = [*self._published, (version, manifest)][-KEPT_FILES:]
        offered = {weights_name(v, self.lineage): (Path(one.path), weights_etag(one)) for v, one in self._published}
        for one in self._deltas:
            name = delta_name(one.version, one.lineage)
            offered[name] = (self.folder / name, delta_etag(one))
        self.files.offer(offered)
        return manifest

    def close(self) -> None:
        """Give back the room that was kept for a next version."""
        (self.folder / NEXT).unlink(missing_ok=True)
