"""Replay of a run's evidence: against the store's own posterior, by hand, and as a command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.value_store import posterior
from services.value_store.posterior import Retention
from services.value_store.replay import Evidence, explained, load_evidence, replay, verdict

ROOT = Path(__file__).parents[3]
STEPS, BATCH, PROMPTS = 30, 16, 24


def record_run(folder: Path, retention: Retention, seed: int) -> Path:
    """A run of made-up rewards whose v̂ comes from the store's own update, one trajectory at a time."""
    rng = np.random.default_rng(seed)
    alpha, beta = np.full(PROMPTS, 4.0), np.full(PROMPTS, 4.0)
    z_last, version_last, visits = np.zeros(PROMPTS), np.zeros(PROMPTS, int), np.zeros(PROMPTS, int)
    rate, z = rng.uniform(0.1, 0.9, PROMPTS), 0.05 * np.arange(STEPS + 1)
    evidence: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        for prompt in rng.choice(PROMPTS, BATCH, replace=False):
            reward, drift = float(rng.random() < rate[prompt]), float(rng.uniform(0.001, 0.02))
            kl = 0.0 if visits[prompt] == 0 else drift
            v_hat = float(posterior.v_hat(alpha[prompt], beta[prompt]))
            one = [np.array([value]) for value in (z[step - 1], z_last[prompt], step - 1, version_last[prompt], kl)]
            rho = retention.rho(*one)[0]
            alpha[prompt], beta[prompt] = posterior.update(alpha[prompt], beta[prompt], rho, reward)
            z_last[prompt], version_last[prompt] = z[step - 1], step - 1
            visits[prompt] += 1
            evidence.append(
                {"step": step, "prompt_id": f"p{prompt}", "outcome": "trained", "reward": reward, "v_hat": v_hat,
                 "first_version": step - 1, "version": step - 1, "tokens": int(rng.integers(1, 50)), "drift": drift}
            )  # fmt: skip
    steps = [{"step": step, "policy_version": step, "z": float(z[step])} for step in range(1, STEPS + 1)]
    folder.mkdir()
    for name, records in (("evidence", evidence), ("steps", steps)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize("mode", ["constant", "event", "drift", "kl"])
def test_the_modes_own_run_is_replayed_exactly(tmp_path: Path, mode: str) -> None:
    base = Retention("constant", (0.875 * 0.96) ** 0.5)
    run = load_evidence(record_run(tmp_path / "run", replace(base, mode=mode), 0))  # type: ignore[arg-type]
    rows = {(row["mode"], row["kappa"]): row for row in replay(run, base, 8.0)}
    name = "constant 0.917" if mode == "constant" else mode
    assert rows[name, 0.0]["r2"] == pytest.approx(rows["as run", 0.0]["r2"], abs=1e-12)
    assert rows[name, 0.0]["brier"] == pytest.approx(rows["as run", 0.0]["brier"], abs=1e-12)
    others = {key: row["brier"] for key, row in rows.items() if key[0] not in (name, "as run")}
    assert all(brier != rows["as run", 0.0]["brier"] for brier in others.values())


def test_both_measures_by_hand() -> None:
    """Batch 1: r = 1, 0 with 1 and 3 tokens, v̂ = ½, 0; batch 2: one trajectory, which has no variance within.

    r̄ = ¼: Var(r) ∝ 1·(¾)² + 3·(¼)² = ¾. e = ½, 0, ē = ⅛: 1·(⅜)² + 3·(⅛)² = 3/16. R² = 1 − ¼.
    """
    columns = {"prompt_N": [0, 1, 2], "step_N": [1, 1, 2], "first_N": [0, 0, 0], "version_N": [0, 0, 0]}
    floats = {"reward_N": [1, 0, 1], "tokens_N": [1, 3, 5], "v_hat_N": [0.5, 0, 0.5], "drift_N": [0, 0, 0]}
    run = Evidence(
        **{name: np.array(values) for name, values in columns.items()},
        **{name: np.array(values, float) for name, values in floats.items()},
        z_V=np.zeros(1),
        mean_V=np.zeros(1),
    )
    assert explained(run, run.v_hat_N) == pytest.approx((0.75, (0.25 + 0 + 0.25) / 3))


def test_one_run_or_a_small_gain_decides_nothing() -> None:
    def rows(drift: float) -> list[dict[str, Any]]:
        return [{"mode": m, "kappa": 0.0, "r2_mean": r2} for m, r2 in (("constant 0.960", 0.2), ("drift", drift))]

    assert verdict(rows(0.205), 3) == "no mode beats constant 0.960 by 0.01 R² (best: drift, +0.0050)"
    assert verdict(rows(0.25), 3) == "drift beats constant 0.960 by 0.0500 R²"
    assert "decide nothing" in verdict(rows(0.25), 1)


def test_as_a_command(tmp_path: Path) -> None:
    folders = [str(record_run(tmp_path / name, Retention("drift"), seed)) for seed, name in enumerate("ab")]
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "singlestream.cli.main", "replay", *folders, "--json", str(out)]
    reply = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert reply.returncode == 0, reply.stderr
    assert "2 run(s) decide nothing" in reply.stdout and "exact drift on 100%" in reply.stdout
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 1 + 6 * 6 and len(result["rows"][0]["r2"]) == 2
    missing = subprocess.run([*command[:4], str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert missing.returncode == 1 and "replay needs a run's folder" in missing.stderr


def test_shrinkage_by_hand() -> None:
    """α = 3, β = 1 and κ = 4 towards ¼: (3 + 1)/(4 + 4) = ½; nothing is drawn before the first batch."""
    assert posterior.shrunk(3.0, 1.0, 0.25, 4.0) == pytest.approx(0.5)
    assert posterior.shrunk(3.0, 1.0, None, 4.0) == posterior.shrunk(3.0, 1.0, 0.25, 0.0) == pytest.approx(0.75)
