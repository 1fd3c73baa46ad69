"""What changed between two weight files of one layout, without loss: small where few bf16 values moved.

A small learning rate leaves most bf16 values as they are, and moves the others by one unit in the last place. So a
delta holds, block by block, where values changed and by how much their **bit patterns** differ (as integers, modulo
2^16 or 2^32): small numbers, which zlib packs well. Adding them to the old bit patterns gives the new ones exactly.

The file, all numbers little-endian::

    b"SSDELTA1"
    block*:  u64 byte offset of the block in the weight file
             u32 changed values (at least 1), u32 bytes of the payload, u8 bytes of a value (2 or 4)
             payload = zlib(steps, differences)
               steps        u32 × changed: position of each changed value less that of the one before it, in values
                            from the block's offset; strictly increasing positions
               differences  u16 or u32 × changed: new bit pattern − old bit pattern

Both arrays are stored byte plane by byte plane (all lowest bytes, then all second ones, …). A block lies within one
tensor and spans at most `BLOCK_VALUES` values; blocks without a change are left out. The policy version carries size
and crc32 of the whole file, and the crc32 of every tensor of the result.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from singlestream.contracts import TensorEntry
from singlestream.errors import WeightsError

MAGIC = b"SSDELTA1"
BLOCK_VALUES = 1 << 20
"""Values of one block: bounds the memory of writing and applying to a few tens of megabytes."""
ZLIB_LEVEL = 1
"""On bf16 deltas higher levels gain a few per cent for several times the time."""
_HEADER = struct.Struct("<QIIB")
_TYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_STEP = np.dtype("<u4")

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
"""Bytes of one value, by the name that manifests use."""


def _planes(values: NDArray[Any]) -> bytes:
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _from_planes(data: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype)[:, 0]


def _pack(offset: int, old: NDArray[Any], new: NDArray[Any]) -> bytes:
    """One block, header included; empty where nothing changed."""
    changed = np.flatnonzero(old != new)
    if not len(changed):
        return b""
    steps = np.diff(changed, prepend=0).astype(_STEP)
    payload = zlib.compress(_planes(steps) + _planes(new[changed] - old[changed]), ZLIB_LEVEL)
    return _HEADER.pack(offset, len(changed), len(payload), new.itemsize) + payload


def write_delta(
    path: Path, old: memoryview, new: memoryview, tensors: Iterable[TensorEntry], limit_bytes: int
) -> tuple[int, int] | None:
    """Write what turns ``old`` into ``new``.

    Args:
        path: file to write.
        old: the weight file before, mapped.
        new: the weight file after, mapped; of the same layout.
        tensors: where the values lie.
        limit_bytes: a delta that would be larger is not worth it.

    Returns:
        (bytes, crc32) of the file; None, and no file, beyond the limit.
    """
    checksum = zlib.crc32(MAGIC)
    written = len(MAGIC)
    with path.open("wb") as file:
        file.write(MAGIC)
        for entry in tensors:
            dtype = _TYPES[ITEM_BYTES[entry.dtype]]
            block_bytes = BLOCK_VALUES * dtype.itemsize
            for offset in range(entry.offset, entry.offset + entry.nbytes, block_bytes):
                end = min(offset + block_bytes, entry.offset + entry.nbytes)
                block = _pack(offset, np.frombuffer(old[offset:end], dtype), np.frombuffer(new[offset:end], dtype))
                checksum = zlib.crc32(block, checksum)
                written += len(block)
                if written > limit_bytes:
                    path.unlink()
                    return None
                file.write(block)
    return written, checksum


def apply_delta(path: Path, target: memoryview) -> int:
    """Turn the old weight file into the new one, in place.

    Args:
        path: the delta.
        target: a copy of the old weight file, mapped writable.

    Returns:
        values changed.

    Raises:
        WeightsError: the delta is damaged, cut short, or for another layout; ``target`` is then of no use.
    """
    total = 0
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise WeightsError(f"{path}: not a weight delta")
        while header := file.read(_HEADER.size):
            if len(header) != _HEADER.size:
                raise WeightsError(f"{path}: cut short in a block's header")
            total += _apply_block(path, file, header, target)
    return total


def _apply_block(path: Path, file: BinaryIO, header: bytes, target: memoryview) -> int:
    offset, changed, payload_bytes, item_bytes = _HEADER.unpack(header)
    dtype = _TYPES.get(item_bytes)
    if dtype is None or not 0 < changed <= BLOCK_VALUES or offset % item_bytes or offset >= len(target):
        raise WeightsError(f"{path}: a block's header makes no sense")
    payload = file.read(payload_bytes)
    if len(payload) != payload_bytes:
        raise WeightsError(f"{path}: cut short in a block")
    expected = changed * (_STEP.itemsize + item_bytes)
    try:
        data = zlib.decompressobj().decompress(payload, expected + 1)
    except zlib.error as error:
        raise WeightsError(f"{path}: a block is damaged: {error}") from error
    if len(data) != expected:
        raise WeightsError(f"{path}: a block holds too little or too much")
    split = changed * _STEP.itemsize
    positions = np.cumsum(_from_planes(data[:split], _STEP), dtype=np.int64)
    room = min(BLOCK_VALUES, (len(target) - offset) // item_bytes)
    if positions[-1] >= room or np.any(np.diff(positions) <= 0):
        raise WeightsError(f"{path}: a block reaches beyond its end")
    # only now: an error with this array in its traceback would keep the file mapped
    values = np.frombuffer(target[offset : offset + room * item_bytes], dtype)
    values[positions] += _from_planes(data[split:], dtype)
    return int(changed)
