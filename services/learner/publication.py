"""Weights on the shared memory volume: one new file a version, named by a manifest.

Only `take_snapshot` must be over before the next optimizer step; `seal` and `write_delta_file` read the file it left,
on the publisher's thread.
"""

from __future__ import annotations

import logging
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch

from singlestream.contracts import TensorEntry, WeightDelta, WeightManifest
from singlestream.errors import WeightsError
from singlestream.weight_delta import write_delta
from singlestream.weight_files import PARTIAL, delta_name, weights_name

log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
"""Tensors start at multiples of this, so that a mapped file can be viewed as any type."""
NEXT = f"next.weights{PARTIAL}"
"""File that `reserve` allocates for the version to come: the first touch of its pages costs more than filling them."""

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Snapshot:
    """One version's bytes, written but not yet checked or named.

    Args:
        path: the file, beside its later name.
        final: the name it gets.
        version: policy version.
        lineage: start of the learner.
        dtype: of every tensor.
        tensors: (name, shape, byte offset, bytes) of each.
        total_bytes: of the file.
    """

    path: Path
    final: Path
    version: int
    lineage: int
    dtype: Dtype
    tensors: list[tuple[str, list[int], int, int]]
    total_bytes: int


def take_snapshot(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, version: int, lineage: int, dtype: Dtype
) -> Snapshot:
    """Copy one version's tensors into a file beside the others.

    Args:
        tensors: (name, whole tensor, contiguous, in ``dtype``); taken one at a time, to hold one in memory.
        folder: on a memory volume; made if missing.
        version: policy version.
        lineage: start of the learner.
        dtype: of every tensor.

    Raises:
        WeightsError: the volume is full; says what must fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / weights_name(version, lineage)
    beside = final.with_name(final.name + PARTIAL)
    reserved = folder / NEXT
    if reserved.is_file():
        reserved.rename(beside)
    placed: list[tuple[str, list[int], int, int]] = []
    try:
        with os.fdopen(os.open(beside, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            for name, tensor in tensors:
                placed.append((name, list(tensor.shape), *_append(file, tensor)))
            total_bytes = file.tell()
            file.truncate()
    except OSError as error:
        raise WeightsError(f"{beside}: {error.strerror}; three versions of the weights must fit there") from error
    return Snapshot(beside, final, version, lineage, dtype, placed, total_bytes)


def _append(file: BinaryIO, tensor: torch.Tensor) -> tuple[int, int]:
    """Write a tensor's bytes at the next aligned offset; returns (offset, bytes)."""
    offset = -(-file.tell() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    file.seek(offset)
    data = memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    file.write(data)
    return offset, len(data)


def seal(snapshot: Snapshot) -> WeightManifest:
    """Take the crc32 of each tensor's bytes and give the file its name; from then on it may be announced."""
    with mapped(snapshot.path) as data:
        entries = [
            TensorEntry(
                name=name,
                dtype=snapshot.dtype,
                shape=shape,
                offset=offset,
                nbytes=nbytes,
                crc32=zlib.crc32(data[offset : offset + nbytes]),
            )
            for name, shape, offset, nbytes in snapshot.tensors
        ]
    snapshot.path.rename(snapshot.final)
    return WeightManifest(path=str(snapshot.final.absolute()), total_bytes=snapshot.total_bytes, tensors=entries)


def same_layout(one: WeightManifest, other: WeightManifest) -> bool:
    """Whether a delta can lead from one file to the other."""
    return [(entry.name, entry.dtype, entry.offset, entry.nbytes) for entry in one.tensors] == [
        (entry.name, entry.dtype, entry.offset, entry.nbytes) for entry in other.tensors
    ]


def write_delta_file(
    old: WeightManifest, old_label: tuple[int, int], new: WeightManifest, new_label: tuple[int, int]
) -> WeightDelta | None:
    """Write what changed between two published files beside the newer one.

    Args:
        old: manifest of the version published before; its file must still be there.
        old_label: its (version, lineage).
        new: manifest of the newer version.
        new_label: its (version, lineage).

    Returns:
        the delta; None where it would be no smaller than the weights themselves, the layout differs, or there is no
        room for it.
    """
    if not same_layout(old, new):
        return None
    folder = Path(new.path).parent
    path = folder / delta_name(*new_label)
    beside = path.with_name(path.name + PARTIAL)
    try:
        with mapped(Path(old.path)) as before, mapped(Path(new.path)) as after:
            written = write_delta(beside, before, after, new.tensors, limit_bytes=new.total_bytes - 1)
    except OSError as error:
        log.warning("version %d goes without a delta: %s", new_label[0], error)
        beside.unlink(missing_ok=True)
        return None
    if written is None:
        return None
    beside.rename(path)
    return WeightDelta(
        base_version=old_label[0],
        base_lineage=old_label[1],
        version=new_label[0],
        lineage=new_label[1],
        nbytes=written[0],
        crc32=written[1],
    )


def reserve(folder: Path, nbytes: int) -> None:
    """Allocate the file of the next version, so that a snapshot only copies; does nothing where there is no room."""
    try:
        with (folder / NEXT).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        log.warning("no room is kept for the next version's weights: %s", error.strerror)
        (folder / NEXT).unlink(missing_ok=True)


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """A file's bytes, mapped read-only."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data,
        memoryview(data) as view,
    ):
        yield view
