"""Checksums of whole files."""

from __future__ import annotations

import zlib
from pathlib import Path

PART_BYTES = 1 << 20


def file_crc32(path: Path) -> int:
    """The crc32 of a file's bytes, read a megabyte at a time."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum
