"""``python -m services.value_store.replay RUN...``: every retention mode and shrinkage on a run's own evidence.

A run's folder holds ``evidence.jsonl`` (one record a trajectory, in the order in which it was counted) and
``steps.jsonl`` (z of every version). From these the posteriors are computed again, with the store's own functions, the
way each mode would have: v̂ of a trajectory comes from all evidence of its prompt that was counted before, as in the
run. Which prompts were drawn stays what the run drew.

Two measures, with e = r − v̂:

* R² = 1 − ΣL(e − ē_b)²/ΣL(r − r̄_b)², over trajectories of L trained tokens, with means weighted by L within each
  batch b: the share of the reward's variance that the baseline takes out of the advantages of a token-mean loss.
* Brier score: mean of e².

v̂ = (α + κm)/(α + β + κ) shrinks towards m, the mean reward of the batch that made the version that the trajectory began
with: about what the store knows at the lease, which is the mean of as many rewards as a batch has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.value_store import posterior
from services.value_store.posterior import Retention
from singlestream.errors import ConfigError, SinglestreamError

Floats = NDArray[np.float64]

KAPPAS = (0.0, 2.0, 4.0, 8.0, 16.0, 64.0)
"""Shrinkages tried, in observations."""
MARGIN = 0.01
"""R² by which a mode must beat the best constant, on the mean over runs, before it counts as better."""


@dataclass(frozen=True)
class Evidence:
    """A run's evidence as columns, N trajectories in the order in which they were counted.

    Args:
        prompt_N: number of its prompt.
        step_N: batch that it was counted in.
        reward_N: in [0, 1].
        tokens_N: trained tokens; 0 for a stale trajectory.
        v_hat_N: baseline that the run used.
        first_N: policy version of its first token.
        version_N: policy version of its last token.
        drift_N: exact D, nats; NaN where it was not measured.
        z_V: drift clock by version.
        mean_V: mean reward of the batch that made the version; NaN for version 0.
    """

    prompt_N: NDArray[np.int64]
    step_N: NDArray[np.int64]
    reward_N: Floats
    tokens_N: Floats
    v_hat_N: Floats
    first_N: NDArray[np.int64]
    version_N: NDArray[np.int64]
    drift_N: Floats
    z_V: Floats
    mean_V: Floats

    def __len__(self) -> int:
        return len(self.prompt_N)


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; replay needs a run's folder") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON lines: {error}") from error


def load_evidence(folder: Path) -> Evidence:
    """Read a run's folder. Raises `ConfigError` where it is none, or its files do not belong together."""
    rows, steps = _records(folder / "evidence.jsonl"), _records(folder / "steps.jsonl")
    if not rows or not steps:
        raise ConfigError(f"{folder}: there is no evidence in it")
    z = {0: 0.0} | {step["policy_version"]: step["z"] for step in steps}
    last = max(max(z), *(row["version"] for row in rows))
    known = np.array([z.get(version, np.nan) for version in range(last + 1)])
    if np.isnan(known).any():
        raise ConfigError(f"{folder}: steps.jsonl has no z of version {int(np.isnan(known).argmax())}")
    names = {name: index for index, name in enumerate(dict.fromkeys(row["prompt_id"] for row in rows))}

    def column(name: str, kind: type) -> Any:
        try:
            return np.array([np.nan if row[name] is None else row[name] for row in rows], kind)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{folder}: a record of evidence.jsonl has no usable {name}") from error

    reward_N, step_N = column("reward", np.float64), column("step", np.int64)
    return Evidence(
        prompt_N=np.array([names[row["prompt_id"]] for row in rows], np.int64),
        step_N=step_N,
        reward_N=reward_N,
        tokens_N=column("tokens", np.float64),
        v_hat_N=column("v_hat", np.float64),
        first_N=column("first_version", np.int64),
        version_N=column("version", np.int64),
        drift_N=column("drift", np.float64),
        z_V=known,
        mean_V=_batch_means(reward_N, step_N, last),
    )


def _batch_means(reward_N: Floats, step_N: NDArray[np.int64], last: int) -> Floats:
    """Mean reward of the batch that made each version, [last + 1]; NaN for version 0 and where no batch made one."""
    steps, place_N = np.unique(step_N, return_inverse=True)
    means = np.full(max(last, int(steps.max())) + 1, np.nan)
    means[steps] = np.bincount(place_N, reward_N) / np.bincount(place_N)
    return means


def _rounds(prompt_N: NDArray[np.int64]) -> Iterable[NDArray[np.int64]]:
    """Rows by how often their prompt has come before: within a round every prompt comes once."""
    order = np.argsort(prompt_N, kind="stable")
    starts = np.flatnonzero(np.diff(prompt_N[order], prepend=-1))
    visit = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    for number in range(int(visit.max()) + 1):
        yield np.sort(order[visit == number])


def posteriors(run: Evidence, retention: Retention, prior_observations: float) -> tuple[Floats, Floats]:
    """Each trajectory's α and β at its lease, [N] each, under a retention.

    Args:
        run: the evidence.
        retention: how old evidence fades.
        prior_observations: α + β of the priors, 1 without offline rewards; their means are the run's first v̂ of each
            prompt.
    """
    prompts = int(run.prompt_N.max()) + 1
    alpha, beta = np.zeros(prompts), np.zeros(prompts)
    estimated = prior_observations > 1.0  # by version 0, so evidence fades from there on
    z_last, version_last = np.full(prompts, 0.0 if estimated else np.nan), np.full(prompts, 0 if estimated else -1)
    alpha_N, beta_N = np.zeros(len(run)), np.zeros(len(run))
    for place, rows in enumerate(_rounds(run.prompt_N)):
        of = run.prompt_N[rows]
        if place == 0:
            alpha[of] = prior_observations * run.v_hat_N[rows]
            beta[of] = prior_observations * (1.0 - run.v_hat_N[rows])
        alpha_N[rows], beta_N[rows] = alpha[of], beta[of]
        version = run.version_N[rows]
        z = run.z_V[version]
        drift = np.zeros(len(rows)) if place == 0 else run.drift_N[rows]
        rho = retention.rho(z, z_last[of], version, version_last[of], drift)
        alpha[of], beta[of] = posterior.update(alpha[of], beta[of], rho, run.reward_N[rows])
        z_last[of], version_last[of] = np.fmax(z, z_last[of]), np.maximum(version, version_last[of])
    return alpha_N, beta_N


def explained(run: Evidence, v_hat_N: Floats) -> tuple[float, float]:
    """(R², Brier score) of a baseline; R² is NaN where no reward differs within its batch."""

    def within(values_N: Floats) -> float:
        _, place_N = np.unique(run.step_N, return_inverse=True)
        weight = np.bincount(place_N, run.tokens_N)
        mean = np.bincount(place_N, run.tokens_N * values_N) / np.maximum(weight, 1e-300)
        return float((run.tokens_N * (values_N - mean[place_N]) ** 2).sum())

    total = within(run.reward_N)
    r2 = 1.0 - within(run.reward_N - v_hat_N) / total if total > 0 else float("nan")
    return r2, float(np.mean((run.reward_N - v_hat_N) ** 2))


def retentions(base: Retention) -> dict[str, Retention]:
    """What is tried: three constants over the band, and the other modes as the settings have them."""
    middle = (base.rho_min * base.rho_max) ** 0.5
    constants = {f"constant {rho:.3f}": rho for rho in (base.rho_min, middle, base.rho_max)}
    return {name: replace(base, mode="constant", rho_constant=rho) for name, rho in constants.items()} | {
        mode: replace(base, mode=mode) for mode in ("event", "drift", "kl")
    }


def replay(run: Evidence, base: Retention, prior_observations: float) -> list[dict[str, Any]]:
    """One row a mode and κ: ``{mode, kappa, r2, brier}``; the first row is the run's own v̂."""
    r2, brier = explained(run, run.v_hat_N)
    mean_N = run.mean_V[run.first_N]
    rows: list[dict[str, Any]] = [{"mode": "as run", "kappa": 0.0, "r2": r2, "brier": brier}]
    for name, retention in retentions(base).items():
        alpha_N, beta_N = posteriors(run, retention, prior_observations)
        plain_N = alpha_N / (alpha_N + beta_N)
        for kappa in KAPPAS:
            v_hat_N = np.where(np.isnan(mean_N), plain_N, (alpha_N + kappa * mean_N) / (alpha_N + beta_N + kappa))
            r2, brier = explained(run, v_hat_N)
            rows.append({"mode": name, "kappa": kappa, "r2": r2, "brier": brier})
    return rows


def verdict(rows: Sequence[dict[str, Any]], runs: int) -> str:
    """What the table says of the default mode: a mode beats the constants only by `MARGIN`, over three runs."""
    plain = {row["mode"]: row["r2_mean"] for row in rows if row["kappa"] == 0.0 and row["mode"] != "as run"}
    constant = max((name for name in plain if name.startswith("constant")), key=lambda name: plain[name])
    best = max(plain, key=lambda name: plain[name])
    gain = plain[best] - plain[constant]
    if runs < 3:
        return f"{runs} run(s) decide nothing; best here: {best}, {gain:+.4f} R² against {constant}"
    if gain >= MARGIN and best != constant:
        return f"{best} beats {constant} by {gain:.4f} R²"
    return f"no mode beats {constant} by {MARGIN} R² (best: {best}, {gain:+.4f})"


def summarise(folders: Sequence[Path], base: Retention, prior_observations: float) -> dict[str, Any]:
    """Replay several runs; means and spread (half the range) of each row, and the verdict."""
    runs = [load_evidence(folder) for folder in folders]
    tables = [replay(run, base, prior_observations) for run in runs]
    rows = []
    for parts in zip(*tables, strict=True):
        row = {"mode": parts[0]["mode"], "kappa": parts[0]["kappa"]}
        for name in ("r2", "brier"):
            values = [part[name] for part in parts]
            row |= {name: values, f"{name}_mean": float(np.mean(values)), f"{name}_spread": float(np.ptp(values)) / 2}
        rows.append(row)
    return {
        "runs": [
            {
                "folder": str(folder),
                "trajectories": len(run),
                "visits_mean": len(run) / (int(run.prompt_N.max()) + 1),
                "exact_drift_share": float(np.mean(~np.isnan(run.drift_N))),
            }
            for folder, run in zip(folders, runs, strict=True)
        ],
        "prior_observations": prior_observations,
        "rows": rows,
        "verdict": verdict(rows, len(runs)),
    }


def show(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [
        f"{run['folder']}: {run['trajectories']} trajectories, {run['visits_mean']:.1f} a prompt; exact drift on "
        f"{run['exact_drift_share']:.0%}"
        for run in result["runs"]
    ]
    lines += ["", "R2: share of the rewards' variance that v-hat explains, higher is better. Brier: lower is better."]
    lines += ["±: half the range over the runs. kappa: value_store.shrinkage."]
    lines += ["", f"{'mode':<16}{'kappa':>6}{'R2':>10}{'±':>8}{'Brier':>9}{'±':>8}"]
    for row in result["rows"]:
        lines.append(
            f"{row['mode']:<16}{row['kappa']:>6.0f}{row['r2_mean']:>10.4f}{row['r2_spread']:>8.4f}"
            f"{row['brier_mean']:>9.4f}{row['brier_spread']:>8.4f}"
        )
    return "\n".join([*lines, "", result["verdict"]])


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, replay, print the table."""
    parser = argparse.ArgumentParser(prog="singlestream replay", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/demo")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    parser.add_argument("--d-half", type=float, default=0.06, help="mean |Δ log p| that halves old evidence, as run")
    parser.add_argument("--rho-min", type=float, default=0.875)
    parser.add_argument("--rho-max", type=float, default=0.96)
    parser.add_argument("--rho-event", type=float, default=0.875)
    parser.add_argument(
        "--prior-observations",
        type=float,
        help="alpha + beta of the priors: 1/(1 - rho_min) as estimated, which is assumed, or 1 without offline rewards",
    )
    options = parser.parse_args(argv)
    base = Retention("constant", 0.92, options.rho_min, options.rho_max, options.rho_event, options.d_half)
    weight = options.prior_observations or 1.0 / (1.0 - options.rho_min)
    try:
        result = summarise(options.folders, base, weight)
    except SinglestreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
