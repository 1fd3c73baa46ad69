"""What the run's logs hold after a resume, and after a power cut in the middle of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.learner.step_log import StepLog


def test_a_resume_cuts_the_logs_and_has_what_is_left_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = StepLog(tmp_path, 0)
    started = (tmp_path / "started_at_s").read_text()
    for step in (1, 2, 3):
        first.write({"step": step}, [{"step": step, "lease_id": f"l{step}"}])
    first.close()
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a crash cut it short

    told: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        told.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        told.append(f"-> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    for folder, step, names in (
        (tmp_path, 2, ["evidence", "steps"]),
        (tmp_path / "new", 0, ["started_at_s", "evidence", "steps"]),
    ):
        told.clear()
        StepLog(folder, step).close()
        files = [name if name == "started_at_s" else f"{name}.jsonl" for name in names]
        partials = [f"{Path(name).stem}.partial" for name in files]
        assert told == [part for pair in zip(partials, files, strict=True) for part in _synced(*pair, folder)]
    for name in ("steps", "evidence"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "started_at_s").read_text() == started, "the clock goes on"


def _synced(partial: str, name: str, folder: Path) -> tuple[str, str, str]:
    return partial, f"-> {name}", folder.name
