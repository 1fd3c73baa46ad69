"""The training loop of Single-stream Policy Optimization (arXiv 2509.13232): take a batch, score it, step, publish.

Every rank runs it; what only rank 0 may do (Redis, files) is inside `Learner`.
"""

from __future__ import annotations

from services.learner.advantages import score
from services.learner.learner import Learner
from services.learner.report import Step
from services.learner.updates import update


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

        with timer("probe"):
            probe = learner.probe(batch)
            exact = learner.exact_drift(batch)
        with timer("forward_backward"):
            advantages = score(batch.samples, learner.config)
            result = update(policy, batch.samples, advantages.scaled_N, learner.step, settings.updates_per_batch)
        with timer("probe"):
            drift = probe.drift()

        clock.advance(drift)
        learner.count_step(result)
        with timer("publish"):
            learner.publish(drift)
            learner.close_leases(batch, exact)
        learner.report(Step(batch, advantages, result, drift, probe, exact, timer.seconds))
        learner.checkpoint_if_due()

    learner.finish()
