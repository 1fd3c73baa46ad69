"""The training loop of Single-stream Policy Optimization (arXiv 2509.13232): take a batch, score it, step, publish.

Every rank runs it; what only rank 0 may do (Redis, files) is inside `Learner`.
"""

from __future__ import annotations

import numpy as np

from services.learner.advantages import advantages, normalise
from services.learner.drift import make_probe
from services.learner.learner import Learner
from services.learner.report import Step


def train(learner: Learner) -> None:
    """Train until the run's last step, its end marker, or a stop request; leaves a checkpoint behind in each case.

    Raises:
        Fenced: another learner has taken over.
        DeadlineExceeded: nothing arrived for too long; names what was waited for.
        NonFiniteSteps: three steps in a row were not finite.
    """
    settings, policy, clock = learner.settings, learner.policy, learner.clock
    learner.publish(drift=0.0)

    while learner.step < learner.total_steps:
        batch = learner.intake.take(learner.step)
        if batch is None:
            break
        timer = learner.timer(batch.wait_s)

        with timer("forward_backward"):
            raw_N = advantages(
                np.array([sample.reward for sample in batch.samples]),
                np.array([sample.v_hat for sample in batch.samples]),
            )
            tokens_N = np.array([sample.trained_tokens for sample in batch.samples])
            advantages_N = normalise(raw_N, tokens_N, settings.normaliser)
            probe = make_probe(policy, batch.upcoming, batch.samples, settings.probe_tokens)
            result = policy.update(batch.samples, advantages_N, learner.step)
            drift = probe.drift() if result.applied else 0.0

        clock.advance(drift)
        learner.count_step(result)
        with timer("publish"):
            learner.publish(drift)
            learner.close_leases(batch.trajectories)
        learner.report(Step(batch, raw_N, result, drift, probe.source, probe.tokens, timer.seconds))
        learner.checkpoint_if_due()

    learner.finish()
