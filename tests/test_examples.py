"""The task that users copy does what its page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.own_task import right_digits
from services.rollout.environments import Turn, make_environment
from services.rollout.graders import Response, load_grader
from singlestream.config import load_config


@pytest.mark.parametrize(
    ("boxed", "reward"), [("408", 1.0), ("418", 2 / 3), ("40", 0.0), ("", 0.0)], ids=["right", "near", "short", "none"]
)
def test_the_grader_gives_a_share_of_the_digits(boxed: str, reward: float) -> None:
    assert right_digits(Response("12*34=?", "408", "", f"\\boxed{{{boxed}}}")) == pytest.approx(reward)


async def test_the_environment_answers_its_own_tool() -> None:
    environment = make_environment("examples.own_task:Calculator", None)
    assert await environment.step(Turn("<code>print(12*34)</code>", "tool"), None) == "<interpreter>408</interpreter>"  # type: ignore[arg-type]
    assert await environment.step(Turn("<code>1/0</code>", "tool"), None) == "<interpreter>?</interpreter>"  # type: ignore[arg-type]
    assert await environment.step(Turn("\\boxed{408}", "end"), None) is None  # type: ignore[arg-type]
    assert await environment.grade(Response("12*34=?", "408", "", "\\boxed{408}")) == 1.0


@pytest.mark.parametrize("name", ["verl:examples.own_task:compute_score", "trl:examples.own_task:box_reward"])
def test_reward_functions_of_other_stacks(name: str) -> None:
    grader = load_grader(name)
    assert grader(Response("q", "408", "… \\boxed{408}", "")) == 1.0
    assert grader(Response("q", "408", "… \\boxed{480}", "")) == 0.0


def test_the_configuration_is_valid() -> None:
    assert load_config(Path(__file__).parent.parent / "examples" / "own_task.toml").run.name == "own-task"
