"""Run by torchrun in tests: a few steps on a recorded batch; rank 0 saves what they made of the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.learner import lora
from services.learner.advantages import advantages, normalise
from services.learner.drift import make_probe
from services.learner.model import full_tensors, parameters
from services.learner.policy import Policy
from services.learner.ranks import Ranks
from services.learner.samples import to_sample
from services.learner.updates import update
from singlestream.config import LearnerConfig
from singlestream.contracts import Trajectory
from tests.services.learner.recorded import trajectory

STEPS = 2
AGE_STEP, AGE_BOUND = 5, 4
SECONDS = 0.5
"""That the MFU is computed for."""


def recorded_batch(rng: np.random.Generator) -> list[Trajectory]:
    """Eleven trajectories of versions 0 to 5: at step 5 they are 5 to 0 old, under a bound of 4, so some are masked."""
    return [trajectory(n, rng, version=n % 6) for n in range(1, 12)]


def steps(model: Path, settings: dict[str, object], ranks: Ranks) -> dict[str, Any]:
    """Facts of each step, and the weights after the last."""
    policy = Policy(model, LearnerConfig(**settings), 1.0, ranks)  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    facts = []
    for step in range(STEPS):
        batch = [to_sample(one, AGE_STEP, AGE_BOUND) for one in recorded_batch(rng)]
        raw = advantages(np.array([s.reward for s in batch]), np.array([s.v_hat for s in batch]))
        scaled = normalise(raw, np.array([s.trained_tokens for s in batch]), "token")
        probe = make_probe(policy, batch[:4], batch, 1000)
        result = update(policy, batch, scaled, step, policy.settings.updates_per_batch)
        means = {name: value for name, value in result.means.items() if name != "entropy"}  # entropy is of a sample
        facts.append({"loss": result.loss, "grad_norm": result.grad_norm, "drift": probe.drift(), **means})
    tensors = {name: tensor.clone() for name, tensor in full_tensors(policy.model, torch.float32)}
    refused = policy.update(batch, np.array([np.nan, *scaled[1:]]), STEPS)
    after = dict(full_tensors(policy.model, torch.float32))
    return {
        "facts": facts,
        "refused": (refused.applied, refused.bad_leases, all(torch.equal(tensors[n], after[n]) for n in tensors)),
        "tensors": tensors,
        "adapters": {n: p.detach().full_tensor() for n, p in parameters(policy.model) if lora.is_adapter(n)},
        "micro_batches": len(policy.micro_batches(batch)),
        "tokens": [sample.tokens for sample in batch],
        "mfu": policy.model_flops_share(batch, SECONDS),
    }


def main(model: Path, out: Path, runs: dict[str, dict[str, object]]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(60)
    results = {name: steps(model, settings, ranks) for name, settings in runs.items()}
    if ranks.first:
        torch.save(results, out)
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
