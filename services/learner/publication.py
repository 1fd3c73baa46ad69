"""Weights on the shared memory volume: one new file a version, named by a manifest."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from singlestream.contracts import TensorEntry, WeightManifest

ALIGNMENT_BYTES = 64
"""Tensors start at multiples of this, so that a mapped file can be viewed as any type."""
KEPT_FILES = 2
"""A replica that has an older file mapped keeps its pages; one that has not opened it yet takes the newest manifest."""
_NAME = re.compile(r"^v\d{8}-l\d+\.weights(\.partial)?$")

Dtype = Literal["bfloat16", "float32"]


def weights_name(version: int, lineage: int) -> str:
    """File name of a version's weights."""
    return f"v{version:08d}-l{lineage}.weights"


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, version: int, lineage: int, dtype: Dtype
) -> WeightManifest:
    """Write one version beside the others and rename it when it is whole.

    Args:
        tensors: (name, whole tensor on the CPU, contiguous, in ``dtype``); taken one at a time, to hold one in memory.
        folder: on a memory volume; made if missing.
        version: policy version.
        lineage: start of the learner.
        dtype: of every tensor.

    Returns:
        The manifest, with a crc32 of each tensor's bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights_name(version, lineage)
    beside = path.with_suffix(".weights.partial")
    entries: list[TensorEntry] = []
    with beside.open("wb") as file:
        for name, tensor in tensors:
            offset = -(-file.tell() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            file.seek(offset)
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            file.write(data)
            entries.append(
                TensorEntry(
                    name=name,
                    dtype=dtype,
                    shape=list(tensor.shape),
                    offset=offset,
                    nbytes=len(data),
                    crc32=zlib.crc32(data),
                )
            )
        total_bytes = file.tell()
    beside.rename(path)
    return WeightManifest(path=str(path.absolute()), total_bytes=total_bytes, tensors=entries)


def remove_older(folder: Path, kept: int = KEPT_FILES) -> list[Path]:
    """Unlink all but the newest files, by time of writing, and what an interrupted write left; returns what went."""
    mine = [path for path in folder.iterdir() if _NAME.match(path.name)]
    whole = sorted((p for p in mine if p.suffix == ".weights"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    gone = [path for path in mine if path.suffix == ".partial"] + whole[: max(0, len(whole) - kept)]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def weights_crc32(manifest: WeightManifest) -> int:
    """One checksum of all tensors, by which two runs' weights can be compared."""
    return zlib.crc32(b"".join(entry.crc32.to_bytes(4, "little") for entry in manifest.tensors))
