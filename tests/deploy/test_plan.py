from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from singlestream.errors import ConfigError
from singlestream.plan import USABLE_SHARE, describe, plan
from tests.deploy.conftest import ROOT


def test_eight_gpus_and_an_8b_model() -> None:
    """5 and 3 balance, 4 and 4 leave the learner about 45 % idle, 2 learners do not fit."""
    proposal = plan(8.2e9, 8, mean_response_tokens=5000)
    assert (proposal.best.rollout_gpus, proposal.best.learner_gpus, proposal.best.tensor_parallel) == (5, 3, 1)
    assert proposal.best.learner_idle < 0.1
    four = next(split for split in proposal.others if split.learner_gpus == 4)
    assert four.learner_idle == pytest.approx(0.45, abs=0.02)
    assert all(split.learner_gpus >= 3 for split in (proposal.best, *proposal.others))
    assert proposal.step_s == pytest.approx(256 * 5000 / (5 * 3250))
    assert proposal.weights_gib == pytest.approx(15.3, abs=0.1)
    assert proposal.weights_volume_gib == pytest.approx(3 * proposal.weights_gib)
    served = plan(8.2e9, 8, mean_response_tokens=5000, network_gbit_per_s=100)
    assert served.weights_volume_gib == pytest.approx(4 * proposal.weights_gib), "one more while it is fetched"


def test_the_guide_shows_what_it_says() -> None:
    guide = (ROOT / "docs" / "deployment.md").read_text()
    command = "$ singlestream plan --parameters 8.2e9 --gpus 8 --mean-response-tokens 5000 --micro-batch-tokens 18432\n"
    shown = guide.partition(command)[2]
    lines = [line for line in shown.partition("```")[0].splitlines() if line != "..."]
    assert len(lines) > 5
    assert set(lines) <= set(describe(plan(8.2e9, 8, 5000, micro_batch_tokens=18_432)).splitlines())


def test_measured_throughputs_replace_the_estimates() -> None:
    proposal = plan(8.2e9, 8, 5000, rollout_tokens_per_s=1000, learner_tokens_per_s=10_000)
    assert proposal.best.learner_gpus == 3
    assert proposal.best.tokens_per_s == 5000
    assert not any("estimated" in assumption for assumption in proposal.assumptions)


def test_a_large_model_gets_tensor_parallel_engines() -> None:
    proposal = plan(32e9, 64, 5000, network_gbit_per_s=100)
    assert proposal.best.tensor_parallel == 2
    assert proposal.best.rollout_gpus % 2 == 0
    assert proposal.network_s == pytest.approx(5.12)
    assert "one whole version takes 5.1 s to another machine, 13%" in describe(proposal)
    slow = plan(32e9, 64, 5000, network_gbit_per_s=1)
    assert "fall behind" in describe(slow)


@pytest.mark.parametrize(
    ("parameters", "gpus", "text"), [(8.2e9, 1, "at least 2"), (70e9, 8, "no split of 8 GPUs"), (0.0, 8, "positive")]
)
def test_what_cannot_be_is_refused(parameters: float, gpus: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(parameters, gpus, 1000)


@given(st.floats(1e8, 3e10), st.integers(2, 64), st.floats(10, 30_000))
def test_a_plan_fits_and_wastes_no_more_than_another_split(parameters: float, gpus: int, tokens: float) -> None:
    try:
        proposal = plan(parameters, gpus, tokens)
    except ConfigError:
        return
    for split in (proposal.best, *proposal.others):
        assert split.rollout_gpus + split.learner_gpus <= gpus
        assert split.replicas * split.tensor_parallel == split.rollout_gpus > 0
        assert split.learner_memory_gib <= USABLE_SHARE * 80
        assert min(split.rollout_idle, split.learner_idle) == pytest.approx(0, abs=1e-9)
        assert 0 <= max(split.rollout_idle, split.learner_idle) < 1
        assert split.tokens_per_s <= proposal.best.tokens_per_s
    assert "assuming that" in describe(proposal)
