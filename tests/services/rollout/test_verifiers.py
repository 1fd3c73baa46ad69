"""A taskset of `verifiers` as prompts and as their grader: the package's own where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.rollout.datasets import main
from services.rollout.environments import make_environment
from services.rollout.graders import Response
from services.rollout.verifiers_tasks import tasks_of
from singlestream.errors import ConfigError
from tests.services.rollout import verifiers_stand_in
from tests.services.rollout.policies import character_tokenizer

MAKE = f"verifiers:{__name__}:sums"


@pytest.fixture(autouse=True)
def vf(monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("verifiers") is None:
        package = types.ModuleType("verifiers")
        package.v1 = verifiers_stand_in  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "verifiers", package)
        monkeypatch.setitem(sys.modules, "verifiers.v1", verifiers_stand_in)
    import verifiers.v1 as package_v1

    return package_v1


def sums(**task_fields: Any) -> Any:
    """A taskset of three sums; half of the reward is for the answer, half for being brief."""
    import verifiers.v1 as vf

    class Sum(vf.TaskData):  # type: ignore[misc]
        answer: str

    class SumTask(vf.Task[Sum]):  # type: ignore[misc]
        @vf.reward(weight=0.5)  # type: ignore[untyped-decorator]
        async def right(self, trace: vf.Trace) -> float:
            return float(trace.last_reply == self.data.answer)

        @vf.reward(weight=0.5)  # type: ignore[untyped-decorator]
        async def brief(self, trace: vf.Trace) -> float:
            return float(len(trace.last_reply) < 5)

    class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):  # type: ignore[misc]
        def load(self) -> Iterator[Any]:
            for i in range(3):
                fields = {"prompt": f"{i}+1=?", "system_prompt": "Be brief.", **task_fields}
                yield SumTask(Sum(answer=str(i + 1), **fields), self.config.task)

    return Sums(vf.TasksetConfig(id="sums"))


def endless() -> Any:
    taskset = sums()
    type(taskset).INFINITE = True
    return taskset


def test_tasks_become_prompts_that_their_tasks_grade(tmp_path: Path) -> None:
    assert main([MAKE, "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [f"Be brief.\n\n{i}+1=?" for i in range(3)]
    assert {row["environment"] for row in rows} == {f"single_turn/{MAKE}"}
    assert len({row["answer"] for row in rows}) == 3


@pytest.mark.parametrize(("text", "reward"), [("2", 1.0), ("3", 0.5), ("It is 2, I think", 0.0)])
async def test_a_task_scores_the_response(text: str, reward: float, tmp_path: Path) -> None:
    main([MAKE, "--out", str(tmp_path / "out.jsonl")])
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])
    environment = make_environment(row["environment"], character_tokenizer())
    assert await environment.grade(Response(row["question"], row["answer"], text, text)) == reward
    with pytest.raises(KeyError):
        await environment.grade(Response(row["question"], "no such task", text, text))


def test_what_needs_a_runtime_or_never_ends_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never ends"):
        list(tasks_of(endless))
    with pytest.raises(ConfigError, match="no prompt"):
        list(tasks_of(lambda: sums(prompt=None)))
    assert main(["verifiers:no.such:taskset", "--out", str(tmp_path / "out")]) == 2
    assert "no.such" in capsys.readouterr().err
