"""The demo itself, in full: what `make demo` runs after set-up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT, ports

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Run the demo as a user does, on ports of its own; returns what it wrote."""
    runs = tmp_path_factory.mktemp("runs")
    env = {**os.environ, "SINGLESTREAM_RUN__RUNS_DIR": str(runs), **ports()}
    command = [sys.executable, "-m", "singlestream.cli.main", "demo"]
    reply = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1100)
    assert reply.returncode == 0, reply.stdout[-4000:] + reply.stderr[-4000:]
    folder = runs / "demo"
    kept = ROOT / "runs" / "test-demo"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in ("report.html", "summary.json", "steps.jsonl"):
        shutil.copy(folder / name, kept / name)
    return {
        "output": reply.stdout,
        "summary": json.loads((folder / "summary.json").read_text()),
        "steps": [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()],
        "report": (folder / "report.html").read_text(),
    }


def test_held_out_accuracy_rises(demo: dict[str, dict[str, float]]) -> None:
    summary = demo["summary"]
    assert summary["n_heldout"] >= 256
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.35


def test_the_ledger_adds_up(demo: dict[str, dict[str, dict[str, dict[str, int]]]]) -> None:
    for counts in demo["summary"]["leases"].values():
        ended = sum(counts[name] for name in ("trained", "stale", "failed", "scored", "cancelled"))
        assert counts["leased"] == counts["outstanding"] + ended
        assert counts["outstanding"] == counts["failed"] == 0


def test_staleness_is_real_and_bounded(demo: dict[str, list[dict[str, float]]]) -> None:
    steps = demo["steps"]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert max(step["staleness_max"] for step in steps) <= 4
    assert any(step["staleness_mean"] > 0 for step in steps)
    assert any(step["version_spans_mean"] > 1 for step in steps), "no trajectory spans two versions"


def test_the_report_shows_it(demo: dict[str, str]) -> None:
    report = demo["report"]
    assert report.count("<svg") == 1
    assert report.count('class="episode"') == 3
    assert "held-out prompts" in report
