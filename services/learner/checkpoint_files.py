"""A checkpoint's folder as bytes on disk: its name, its ``state.json``, and whether all is there and unchanged."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from singlestream.checksums import file_crc32
from singlestream.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 2
STATE_FILE = "state.json"
ARCHIVE = "archive"
"""Folder beside the checkpoints of a resume: what is kept for good, to export."""
UNREADABLE = -1
"""In place of a crc32."""
_NAME = re.compile(r"^step-(\d{8})-([0-9a-f]+)$")


def checkpoint_name(step: int, token: str) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:08d}-{token}"


def step_of(name: str) -> int:
    """Step in a checkpoint's name. Raises `CheckpointError` for any other name."""
    match = _NAME.match(name)
    if match is None:
        raise CheckpointError(f"{name!r} is no name of a checkpoint")
    return int(match[1])


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``. Raises OSError or ValueError."""
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return state


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files, every byte of them read; empty where all is well."""
    if found := incomplete(path):
        return found
    files = read_state(path)["files"]
    return mismatch(path.name, files, [crc32_of(path / name) for name in sorted(files)])


def incomplete(path: Path) -> str:
    """What is wrong with a checkpoint by its files' names and sizes; empty where nothing is."""
    try:
        state = read_state(path)
    except (OSError, ValueError) as error:
        return f"{path.name}: {STATE_FILE} cannot be read: {error}"
    if state.get("format") != FORMAT:
        return f"{path.name}: format {state.get('format')!r}; this build reads {FORMAT}"
    for name, expected in state["files"].items():
        file = path / name
        if not file.is_file():
            return f"{path.name}: {name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{path.name}: {name} has {file.stat().st_size} bytes, not {expected['bytes']}"
    return ""


def mismatch(checkpoint: str, files: dict[str, dict[str, int]], crc32s: list[int]) -> str:
    """The first file, by name, whose crc32 is not the one noted; empty where all are."""
    wrong = [name for name, found in zip(sorted(files), crc32s, strict=True) if found != files[name]["crc32"]]
    return f"{checkpoint}: {wrong[0]} fails its checksum" if wrong else ""


def crc32_of(path: Path) -> int:
    """A file's crc32; `UNREADABLE` where it cannot be read, for a reason that the log has."""
    try:
        return file_crc32(path)
    except OSError as error:
        log.error("%s cannot be read: %s", path, error)
        return UNREADABLE


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk: a file that was synced may still be without a name after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def named(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.match(path.name)), key=lambda path: path.name)
