"""Names of the weight files of a run, and which of them are kept. Learner and replicas agree on these."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection
from pathlib import Path

from singlestream.contracts import WeightDelta, WeightManifest

KEPT_FILES = 2
"""A replica that has an older file mapped keeps its pages; one that has not opened it yet takes the newest manifest."""
PARTIAL = ".partial"
"""Suffix of a file that is not whole yet."""
_NAME = re.compile(r"^(v\d{8,}-l\d+|next)\.(weights|delta)(\.partial)?$")


def weights_name(version: int, lineage: int) -> str:
    """File name of a version's weights."""
    return f"v{version:08d}-l{lineage}.weights"


def delta_name(version: int, lineage: int) -> str:
    """File name of what changed from the version published before this one."""
    return f"v{version:08d}-l{lineage}.delta"


def weights_crc32(manifest: WeightManifest) -> int:
    """One checksum of all tensors, by which two runs' weights can be compared."""
    return zlib.crc32(b"".join(entry.crc32.to_bytes(4, "little") for entry in manifest.tensors))


def weights_etag(manifest: WeightManifest) -> str:
    """HTTP entity tag of a version's weight file: both sides know it from the manifest."""
    return f'"{weights_crc32(manifest):08x}-{manifest.total_bytes}"'


def delta_etag(delta: WeightDelta) -> str:
    """HTTP entity tag of a delta file."""
    return f'"{delta.crc32:08x}-{delta.nbytes}"'


def remove_older(folder: Path, keep: Collection[str] = ()) -> None:
    """Unlink older weights, deltas, and what an interrupted write left; other files are left alone.

    Args:
        folder: of one run's weights; its `KEPT_FILES` newest whole weight files stay, by time of writing.
        keep: names that stay; weights among them count as the newest, whatever a clock that was set back says.
    """
    mine = [path for path in folder.iterdir() if _NAME.match(path.name)]
    whole = sorted((p for p in mine if p.suffix == ".weights"), key=lambda p: (p.name in keep, p.stat().st_mtime_ns))
    others = [path for path in mine if path.suffix != ".weights"]
    for path in others + whole[:-KEPT_FILES]:
        if path.name not in keep:
            path.unlink(missing_ok=True)
