from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.learner.anchors import Anchor, measure
from services.learner.samples import Sample, to_sample
from tests.services.learner.recorded import prompt, trajectory


def sample(n: int) -> Sample:
    return to_sample(trajectory(n, np.random.default_rng(n)), 0, 4)


@given(st.integers(1, 50), st.floats(0, 1e6), st.integers(0, 10**6))
def test_an_anchor_comes_back_from_redis(n: int, z: float, step: int) -> None:
    kept = Anchor(step, z, sample(n))
    found = Anchor.unpack(kept.pack())
    assert (found.step, found.z, found.sample.prompt_id) == (step, z, prompt(n))
    for name in ("token_ids_T", "action_T", "behaviour_T"):
        np.testing.assert_array_equal(getattr(found.sample, name), getattr(kept.sample, name))


class TwoMicroBatches:
    """Log-probs that are a function of the token and of the step; the second micro-batch holds the first samples."""

    settings: Any = SimpleNamespace(d_half=0.06)
    ranks: Any = SimpleNamespace(sum=lambda tensor: None)

    def __init__(self, moved: float) -> None:
        self.moved = moved

    def micro_batches(self, samples: list[Sample]) -> list[Any]:
        half = len(samples) // 2
        return [self.micro(samples, list(part)) for part in (range(half, len(samples)), range(half))]

    def micro(self, samples: list[Sample], chosen: list[int]) -> Any:
        rows = [samples[index] for index in chosen]
        tokens = np.concatenate([row.token_ids_T[row.action_T] for row in rows]) if rows else np.empty(0)
        row_A = np.repeat(np.arange(len(rows)), [row.action_tokens for row in rows])
        return SimpleNamespace(samples=chosen, row_A=torch.from_numpy(row_A), tokens=torch.from_numpy(tokens))

    def logprobs(self, micros: list[Any]) -> list[torch.Tensor]:
        return [-0.01 * micro.tokens.double() - self.moved for micro in micros]


def test_drift_is_measured_on_each_prompts_own_response() -> None:
    first = [sample(n) for n in range(1, 6)]
    keep = [True, True, False, True, True]
    left = measure(TwoMicroBatches(0.0), first, [None] * 5, keep, 3, 0.5)  # type: ignore[arg-type]
    assert left.drift_N == left.clock_N == [None] * 5 and left.means()["anchors"] == 0
    assert [anchor.sample.lease_id for anchor in left.kept] == [first[i].lease_id for i in (0, 1, 3, 4)]
    for anchor in left.kept:
        tokens = anchor.sample.token_ids_T[anchor.sample.action_T]
        assert anchor.sample.behaviour_T[anchor.sample.action_T] == pytest.approx(-0.01 * tokens)
        assert not anchor.sample.behaviour_T[~anchor.sample.action_T].any()

    second = [sample(n) for n in range(11, 14)]
    anchors = [left.kept[0], None, left.kept[2]]
    found = measure(TwoMicroBatches(0.02), second, anchors, [False] * 3, 5, 0.8)  # type: ignore[arg-type]
    assert found.drift_N == [pytest.approx(0.02, abs=1e-6), None, pytest.approx(0.02, abs=1e-6)]
    assert found.clock_N == [pytest.approx(0.3 * 0.06), None, pytest.approx(0.3 * 0.06)]
    assert found.means() == {
        "anchors": 2,
        "drift_exact": pytest.approx(0.02, abs=1e-6),
        "drift_clock": pytest.approx(0.018),
    }


def test_an_anchor_that_this_very_step_left_before_a_crash_is_not_used() -> None:
    batch = [sample(1)]
    [anchor] = measure(TwoMicroBatches(0.0), batch, [None], [True], 3, 0.5).kept  # type: ignore[arg-type]
    again = measure(TwoMicroBatches(0.0), batch, [anchor], [True], 3, 0.5)  # type: ignore[arg-type]
    assert again.drift_N == [None]


def test_the_members_of_a_group_share_one_pass_over_their_anchor() -> None:
    anchors = measure(TwoMicroBatches(0.0), [sample(1), sample(2)], [None] * 2, [True] * 2, 3, 0.5).kept  # type: ignore[arg-type]
    scored: list[str] = []
    policy = TwoMicroBatches(0.02)
    lay_out = policy.micro_batches
    policy.micro_batches = lambda samples: scored.extend(one.lease_id for one in samples) or lay_out(samples)  # type: ignore[method-assign]
    of = [anchors[0], anchors[1], Anchor.unpack(anchors[0].pack()), None]
    found = measure(policy, [sample(n) for n in range(11, 15)], of, [False] * 4, 5, 0.8)  # type: ignore[arg-type]
    assert scored == [anchor.sample.lease_id for anchor in anchors]
    assert found.drift_N == [pytest.approx(0.02, abs=1e-6)] * 3 + [None]
