from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from services.learner.drift import DriftClock, choose_probe, make_probe
from services.learner.samples import Sample, to_sample
from tests.services.learner.recorded import trajectory


def samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(2)
    return [to_sample(trajectory(n, rng), 0, 4) for n in range(1, count + 1)]


def test_the_clock_counts_in_half_drifts_and_never_goes_back() -> None:
    clock = DriftClock(d_half=0.06)
    assert clock.advance(0.03) == pytest.approx(0.5)
    assert clock.advance(0.0) == pytest.approx(0.5)
    assert clock.advance(0.06) == pytest.approx(1.5)


def test_a_clock_that_went_back_goes_by_what_was_written_and_on_from_there() -> None:
    """A second lineage from version 2 on, whose probes read otherwise: one z a version, and it never falls."""
    clock = DriftClock(0.06, 1.0, 2, {2: 1.0, 3: 1.5, 4: 2.5})
    assert [clock.advance(drift) for drift in (0.09, 0.006, 0.003)] == [1.5, 2.5, pytest.approx(2.55)]


def test_the_probe_takes_whole_trajectories_within_its_tokens() -> None:
    batch = samples(8)
    most = batch[0].action_tokens + batch[1].action_tokens
    assert choose_probe(batch, most) == batch[:2]
    assert choose_probe(batch, 1) == batch[:1], "one at least"
    assert choose_probe([], 100) == []


@pytest.mark.parametrize(("arrived", "source"), [(0, "trained_batch"), (1, "trained_batch"), (6, "next_batch")])
def test_too_few_arrivals_are_no_probe(arrived: int, source: str) -> None:
    policy: Any = SimpleNamespace(micro_batches=lambda batch: [], logprobs=lambda micro_batches: [])
    batch = samples(12)
    probe = make_probe(policy, batch[:arrived], batch, 10_000)
    assert probe.source == source
    assert probe.tokens == sum(s.action_tokens for s in (batch[:arrived] if source == "next_batch" else batch))
