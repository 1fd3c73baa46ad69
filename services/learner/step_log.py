"""``steps.jsonl``, one record a step, and ``evidence.jsonl``, one a trajectory; both tell the surviving lineage."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from services.learner.checkpoint_files import sync_folder

STEPS, EVIDENCE = "steps.jsonl", "evidence.jsonl"
STARTED = "started_at_s"


def surviving_records(lines: Iterable[str], step: int) -> Iterator[str]:
    """Lines up to and including ``step``; a last line that a crash cut short, and all beyond ``step``, are dropped."""
    for line in lines:
        try:
            survives = json.loads(line)["step"] <= step
        except (ValueError, KeyError):
            continue
        if survives:
            yield line.rstrip("\n") + "\n"


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file anew, whole or not at all, also where the power fails."""
    beside = path.with_suffix(".partial")
    with beside.open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


class _Lines:
    """A file of JSON lines with a step in each; what a resume takes again is cut off."""

    def __init__(self, path: Path, step: int) -> None:
        path.touch()
        with path.open() as before:
            _replace(path, surviving_records(before, step) if step else ())
        self._file = path.open("a")

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class StepLog:
    """Appends one record a step, and one for each trajectory counted.

    Args:
        folder: of the run; made if missing.
        step: step at which the learner goes on; 0 begins a new log and a new clock.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        started = folder / STARTED
        if step == 0 or not started.is_file():
            _replace(started, [repr(time.time())])
        self._started_s = float(started.read_text())
        self._evidence = _Lines(folder / EVIDENCE, step)
        self._steps = _Lines(folder / STEPS, step)

    def write(self, record: dict[str, Any], evidence: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Append a record with the seconds since the run's first start; returns it as written."""
        self._evidence.append(evidence)
        record = {**record, "wall_s": round(time.time() - self._started_s, 3)}
        self._steps.append([record])
        return record

    def sync(self) -> None:
        """Have what was written on disk."""
        self._evidence.sync()
        self._steps.sync()

    def close(self) -> None:
        """Write out what is buffered."""
        self._evidence.close()
        self._steps.close()
