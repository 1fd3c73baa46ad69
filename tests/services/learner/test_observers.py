from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console

from services.learner.observers import ProgressLine, WeightsAndBiases

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
    assert b"learner/reward_mean" in kept.read_bytes()
