from __future__ import annotations

import io
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.learner.metrics import Metrics
from services.learner.observers import Observers, ProgressLine, WeightsAndBiases

RECORD = {
    "step": 3,
    "reward_mean": 0.4321,
    "staleness_mean": 1.25,
    "tokens_per_s": 3412.0,
    "learner_idle_ratio": 0.12,
    "mfu": None,
    "drift_source": "next_batch",
}


def test_a_terminal_gets_one_line_and_log_lines_go_on_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    before = sys.stderr
    handler = logging.StreamHandler(before)
    logging.getLogger().addHandler(handler)
    try:
        line = ProgressLine(2, 10, Console(file=screen, force_terminal=True, width=160))
        assert handler.stream is not before, "log lines pass through the console"
        line.observe(RECORD)
        line.close()
    finally:
        logging.getLogger().removeHandler(handler)
    assert handler.stream is before is sys.stderr
    for part in ("3/10", "reward 0.432", "staleness 1.25", "3,412 tokens/s", "idle 12%"):
        assert part in screen.getvalue()


def test_a_file_gets_no_line() -> None:
    screen = io.StringIO()
    line = ProgressLine(2, 10, Console(file=screen))
    line.observe(RECORD)
    line.close()
    assert screen.getvalue() == ""


def test_weights_and_biases_keeps_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    board = WeightsAndBiases("singlestream-test", "run", tmp_path)
    board.observe(RECORD)
    board.close()
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline_s = time.monotonic() + 60
    while b"learner/reward_mean" not in kept.read_bytes():  # a process of wandb's writes it, after the end too
        assert time.monotonic() < deadline_s, f"wandb has not written the record: {kept.read_bytes()!r}"
        time.sleep(0.1)


def test_what_only_watches_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def observe(self, record: dict[str, Any]) -> None:
            raise ConnectionError("the tracker is gone")

        def close(self) -> None:
            raise OSError("still gone")

    screen, metrics = io.StringIO(), Metrics()
    line = ProgressLine(2, 10, Console(file=screen, force_terminal=True, width=160))
    observers = Observers({"the tracker": Broken(), "line": line}, metrics.count_tracking_failure)
    for _ in range(3):
        observers.observe(RECORD)
    observers.close()
    assert "reward 0.432" in screen.getvalue(), "the others go on"
    assert [record.getMessage().count("the tracker is gone") for record in caplog.records] == [1]
    assert b'tracking_failures_total{observer="the tracker"} 4.0' in metrics.text()
