"""``steps.jsonl`` and TensorBoard: one record a step, of the surviving lineage only."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "steps.jsonl"
STARTED = "started_at_s"


def surviving_records(text: str, step: int) -> list[str]:
    """Lines up to and including ``step``; a last line that a crash cut short, and all beyond ``step``, are dropped."""
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    return kept


class StepLog:
    """Appends one record a step.

    Args:
        folder: of the run; made if missing.
        step: step at which the learner goes on; 0 begins a new log and a new clock.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        started = folder / STARTED
        if step == 0 or not started.is_file():
            started.write_text(repr(time.time()))
        self._started_s = float(started.read_text())
        self._cut(step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def _cut(self, step: int) -> None:
        kept = surviving_records(self.path.read_text(), step) if step and self.path.is_file() else []
        beside = self.path.with_suffix(".partial")
        beside.write_text("".join(line + "\n" for line in kept))
        os.replace(beside, self.path)

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record with the seconds since the run's first start; returns it as written."""
        record = {**record, "wall_s": round(time.time() - self._started_s, 3)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"learner/{name}", value, record["step"])
        return record

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        self._board.close()
