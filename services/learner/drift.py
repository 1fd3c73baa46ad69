"""The drift clock: how far one update moved the policy, in units of the drift that halves old evidence.

At each publication the clock z advances by mean |log π_{k+1} − log π_k| / D_half over a probe of action tokens. The
probe is the beginning of the *next* batch, since a batch just trained on reads 1.1–1.6 × high (docs/design.md,
``drift``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from services.learner.policy import Policy
from services.learner.samples import Sample

log = logging.getLogger(__name__)

LEAST_SHARE = 0.25
"""Share of a full probe that must have arrived of the next batch. The first few to arrive are the short and certain:
on the tiny task they read up to 20 × low, and one odd trajectory among them 50 × high."""

Source = Literal["next_batch", "trained_batch"]


def choose_probe(samples: Sequence[Sample], most_tokens: int) -> list[Sample]:
    """The first samples, whole, while their action tokens stay within ``most_tokens``; at least one that has any."""
    chosen: list[Sample] = []
    tokens = 0
    for sample in samples:
        if sample.action_tokens == 0:
            continue
        if chosen and tokens + sample.action_tokens > most_tokens:
            break
        chosen.append(sample)
        tokens += sample.action_tokens
    return chosen


@dataclass
class DriftClock:
    """z and the unit it counts in.

    A version's z is written once. A learner that went back to a checkpoint takes the steps behind it again, on probes
    that may be others; it goes by what the clock says of their versions, and counts on from there.

    Args:
        d_half: mean |Δ log p| that halves old evidence.
        z: dimensionless; never decreases.
        version: that z is of.
        written: version → z, of versions that have been published before.
    """

    d_half: float
    z: float = 0.0
    version: int = 0
    written: Mapping[int, float] = field(default_factory=dict)

    def advance(self, drift: float) -> float:
        """Go on to the next version, by its drift, finite and ≥ 0, or by what was written of it; returns the new z."""
        self.version += 1
        self.z = max(self.z, self.written.get(self.version, self.z + drift / self.d_half))
        return self.z


class Probe:
    """Scores the same tokens in the same micro-batches before and after a step. Collective.

    Args:
        policy: the policy under training.
        samples: what to score.
        source: where the samples came from.
    """

    def __init__(self, policy: Policy, samples: Sequence[Sample], source: Source) -> None:
        self.policy, self.source = policy, source
        self._micro_batches = policy.micro_batches(samples) if samples else []
        self._before = policy.logprobs(self._micro_batches)
        self.tokens = sum(sample.action_tokens for sample in samples)

    def drift(self) -> float:
        """Mean |log π_now − log π_then| over the probe's action tokens, over ranks; 0 without any, or not finite."""
        total = torch.zeros(2, dtype=torch.float64)
        after = self.policy.logprobs(self._micro_batches)
        for micro, then_A, now_A in zip(self._micro_batches, self._before, after, strict=True):
            if micro.samples:
                total += torch.stack([(now_A - then_A).abs().double().sum().cpu(), torch.tensor(float(len(now_A)))])
        self.policy.ranks.sum(total)
        drift = float(total[0] / total[1]) if total[1] else 0.0
        if not math.isfinite(drift):
            log.error("the drift of the probe is not finite: it counts as none")
            return 0.0
        return drift


def make_probe(policy: Policy, upcoming: Sequence[Sample], trained: Sequence[Sample], most_tokens: int) -> Probe:
    """Score, before the step, what has arrived of the next batch; the batch to be trained where too little has.

    Args:
        policy: the policy under training.
        upcoming: trajectories of the next batch.
        trained: the batch about to be trained.
        most_tokens: action tokens of the probe.
    """
    wanted = min(most_tokens, sum(sample.action_tokens for sample in trained))
    chosen = choose_probe(upcoming, most_tokens)
    if sum(sample.action_tokens for sample in chosen) >= LEAST_SHARE * wanted:
        return Probe(policy, chosen, "next_batch")
    return Probe(policy, choose_probe(trained, most_tokens), "trained_batch")
