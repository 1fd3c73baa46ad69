"""The runs of configs/: their numbers have reasons; the experiment's arms differ in the algorithm alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from singlestream.config import Config, load_config
from singlestream.plan import plan
from tests.deploy.conftest import ROOT, env_file


def settings(config: Config) -> dict[str, Any]:
    dumped = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, values in dumped.items() for key, value in values.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_number_has_its_source_or_its_reason(path: Path) -> None:
    numbers = re.findall(r"^\w+ = -?[\d._e-]+(.*)$", path.read_text(), re.M)
    assert len(numbers) > 8
    assert all(re.match(r" +# \S", rest) for rest in numbers)


def test_the_arms_differ_in_the_algorithm_alone() -> None:
    spo, grpo = (settings(load_config(ROOT / "configs" / f"qwen3-8b-dapo-{arm}.toml")) for arm in ("spo", "grpo"))
    assert {key for key in spo if spo[key] != grpo[key]} == {
        "run.name",
        "value_store.group_size",
        "value_store.sampling",
        "learner.advantage",
    }


def test_the_gpus_are_split_as_planned() -> None:
    config = load_config(ROOT / "configs" / "qwen3-8b-dapo-spo.toml")
    given = env_file()
    rollout, learner = (given[name].split(",") for name in ("ROLLOUT_GPUS", "LEARNER_GPUS"))
    best = plan(8.2e9, 8, 5000, micro_batch_tokens=config.learner.micro_batch_tokens).best
    assert (best.rollout_gpus, best.learner_gpus) == (len(rollout), len(learner))
    assert config.learner.ranks == len(learner)
    assert int(given["ROLLOUT_REPLICAS"]) * int(given["TENSOR_PARALLEL"]) == len(rollout)
    assert best.tensor_parallel == config.rollout.tensor_parallel == int(given["TENSOR_PARALLEL"])
