"""SPO against GRPO, and the retention modes, on the demo's task: several runs of each, through all services.

    python -m benchmarks.curves             # three seeds of each on the tiny model, about half an hour on two cores
    python -m benchmarks.curves --model smollm2 --methods exact   # the retention modes on a real language model
    python -m benchmarks.curves --figure    # the figure and tables again, from what has run

The methods of a seed run one after the other, and every second seed in the reverse order, so that their seconds may be
compared where the machine did nothing else. Every run keeps its folder ``runs/curves-…``; one that is there already is
not run again: move it away first, or its seconds are those of another hour. The results go to
``benchmarks/results/``: a figure with mean and range over the seeds, by tokens and by wall time, and the replay of the
evidence of the SPO runs that measured exact drift. A seed changes the sampling of prompts and tokens, never the order
in which processes are scheduled: two runs of one seed differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import commit, machine

RESULTS = Path("benchmarks/results")
METHODS: dict[str, dict[str, str]] = {
    "spo": {"LEARNER__ANCHOR_SHARE": "0.0"},
    "grpo": {"LEARNER__ADVANTAGE": "grpo", "VALUE_STORE__GROUP_SIZE": "8", "LEARNER__ANCHOR_SHARE": "0.0"},
    # SPO with every prompt's previous response kept, so that `kl` can be replayed with its exact drift everywhere; the
    # passes over those responses cost time
    "exact": {"LEARNER__ANCHOR_SHARE": "1.0"},
}
"""Environment of each method, on top of the demo's configuration: nothing else differs."""
MODELS: dict[str, dict[str, str]] = {
    "tiny": {},
    # three passes over each trajectory and its prompt's previous one take a second on two cores: few prompts, visited
    # often, at a learning rate that leaves the reward between 0 and 1
    "smollm2": {
        "RUN__TOTAL_STEPS": "24",
        "RUN__TRAIN_BATCH_SIZE": "16",
        "RUN__MAX_STALENESS": "1",
        "LEARNER__LR": "1e-5",
        "LEARNER__PROBE_TOKENS": "64",
        "LEARNER__CHECKPOINT_EVERY": "1000",
    },
}
"""Environment of every method on a model."""
PROMPTS = {"smollm2": 40}
"""Prompts kept of each split, where not all are."""
DRAWN = {"spo": ("SPO", "#1f77b4"), "grpo": ("GRPO", "#d62728"), "exact": ("SPO, exact drift of all", "#2ca02c")}
"""Method → its name in the figure, and its colour."""
WINDOW = 3
"""Batches of the moving mean in the figure."""


def order(methods: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """(method, seed) of every run, in turn: whatever slows the machine for a while slows each method alike."""
    return [(method, seed) for seed in range(seeds) for method in (methods if seed % 2 == 0 else methods[::-1])]


def run_name(model: str, method: str, seed: int) -> str:
    """Name of one run and of its folder."""
    return f"curves-{model}-{method}-{seed}"


def with_few_prompts(model: Path, most: int) -> Path:
    """A folder of links to a model's files, with the first ``most`` prompts of each split."""
    folder = Path("runs") / f"curves-model-{model.name}-{most}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != "prompts.jsonl" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    prompts = [json.loads(line) for line in (model / "prompts.jsonl").read_text().splitlines()]
    chosen = [one for split in ("eval", "train") for one in [p for p in prompts if p["split"] == split][:most]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in chosen))
    return folder


def train(model: str, method: str, seed: int, steps: int | None) -> None:
    """Run the demo once with this method; a run that is whole is kept."""
    folder = Path("runs") / run_name(model, method, seed)
    if (folder / "summary.json").is_file():
        return
    settings = MODELS[model] | METHODS[method] | {"RUN__NAME": folder.name, "RUN__SEED": str(seed)}
    if model in PROMPTS:
        settings["RUN__MODEL"] = str(with_few_prompts(Path(".cache/models") / model, PROMPTS[model]))
    environment = os.environ | {f"SINGLESTREAM_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "singlestream.cli.main", "demo", "--model", model]
    command += [] if steps is None else ["--steps", str(steps)]
    print(f"== {folder.name}", flush=True)
    subprocess.run(command, env=environment, check=True)


def load(model: str, method: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(summary, steps) of every finished run of a method, by seed."""
    runs = []
    for folder in sorted(Path("runs").glob(run_name(model, method, 0)[:-1] + "*")):
        if (folder / "summary.json").is_file():
            steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
            started = folder / "started_at_s"
            summary = json.loads((folder / "summary.json").read_text())
            summary["started_at_s"] = float(started.read_text()) if started.is_file() else None
            runs.append((summary, steps))
    return runs


def curve(steps: Sequence[dict[str, Any]], over: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(x, mean reward of the last `WINDOW` batches) of one run; x are million tokens, or seconds of training."""
    reward = np.array([step["reward_mean"] for step in steps])
    smooth = np.array([reward[max(0, i + 1 - WINDOW) : i + 1].mean() for i in range(len(reward))])
    if over == "tokens":
        return np.cumsum([step["action_tokens"] for step in steps]) / 1e6, smooth
    wall = np.array([step["wall_s"] for step in steps])
    first = steps[0]
    begin = first["wall_s"] - sum(first[f"{part}_s"] for part in ("probe", "forward_backward", "publish"))
    return wall - begin, smooth


def draw(model: str, methods: Sequence[str], path: Path) -> None:
    """The figure: reward by tokens and by seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, over in zip(axes, ("tokens", "seconds"), strict=True):
        for method in methods:
            name, colour = DRAWN[method]
            curves = [curve(steps, over) for _, steps in load(model, method)]
            if not curves:
                continue
            grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 100)
            values = np.array([np.interp(grid, x, y) for x, y in curves])
            mean, low, high = values.mean(0), values.min(0), values.max(0)
            axis.plot(grid, mean, color=colour, label=f"{name}: {len(curves)} runs")
            axis.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_xlabel("million sampled tokens" if over == "tokens" else "seconds since the first batch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"mean reward, moving over {WINDOW} batches")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{model}: mean of the runs, and their range")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def rows(model: str) -> list[dict[str, Any]]:
    """One row a run: what it reached, and what it took."""
    found = []
    for method in METHODS:
        for summary, steps in load(model, method):
            groups = sum(step["groups"] for step in steps)
            found.append(
                {
                    "method": method,
                    "steps": len(steps),
                    "heldout_before": summary["accuracy_before"],
                    "heldout_after": summary["accuracy_after"],
                    "reward_last_5": float(np.mean([step["reward_mean"] for step in steps[-5:]])),
                    "mtokens": sum(step["action_tokens"] for step in steps) / 1e6,
                    "started_at_s": summary["started_at_s"],
                    "train_wall_s": summary["train_wall_s"],
                    "idle": float(np.mean([step["learner_idle_ratio"] for step in steps])),
                    "degenerate_groups": sum(step["degenerate_groups"] for step in steps) / groups if groups else None,
                    "mtokens_by_step": curve(steps, "tokens")[0].round(4).tolist(),
                    "seconds_by_step": curve(steps, "seconds")[0].round(2).tolist(),
                    "reward_by_step": [step["reward_mean"] for step in steps],
                }
            )
    return found


def write(model: str, methods: Sequence[str]) -> None:
    """Figure of these methods, table and replay of all finished runs, into `RESULTS`."""
    found = rows(model)
    draw(model, methods, RESULTS / f"curves-{model}.svg")
    report = {"benchmark": "curves", "model": model, "commit": commit(), "machine": machine(), "runs": found}
    (RESULTS / f"curves-{model}.json").write_text(json.dumps(report, indent=2) + "\n")
    for row in found:
        plain = {name: value for name, value in row.items() if not isinstance(value, list)}
        print(
            "  ".join(f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in plain.items())
        )
    folders = [str(Path("runs") / run_name(model, "exact", seed)) for seed in range(len(load(model, "exact")))]
    if folders:
        replay = [sys.executable, "-m", "services.value_store.replay", *folders]
        subprocess.run([*replay, "--json", str(RESULTS / f"retention-{model}.json")], check=True)


def main() -> None:
    """Run what is missing, one run at a time; then write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("--model", default="tiny", choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the configuration's")
    parser.add_argument("--figure", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.figure:
        for method, seed in order(options.methods, options.seeds):
            train(options.model, method, seed, options.steps)
    write(options.model, options.methods)


if __name__ == "__main__":
    main()
