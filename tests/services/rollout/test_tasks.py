"""Datasets to prompts, on files of the real schemas; reward functions of other stacks; reasoning-gym."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from services.rollout.datasets import SCHEMAS, main
from services.rollout.environments import make_environment
from services.rollout.environments.reasoning_gym import entries
from services.rollout.graders import Response, apply_grader, load_grader
from tests.services.rollout.policies import character_tokenizer


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "data_source": "x",
        "prompt": [{"content": question, "role": "user"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
    }


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)

ROWS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str]]]] = {
    "dapo_math_17k": (
        [chat(DAPO.format("What is 1+1?"), "2"), chat("What is 1+1?", "2"), chat("And 2+2?", "4")],
        [("What is 1+1?", "2"), ("And 2+2?", "4")],
    ),
    "math": (
        [chat("Let's think step by step and output the final answer within \\boxed{}.\n\nFind $x$.", "\\frac12")],
        [("Find $x$.", "\\frac12")],
    ),
    "gsm8k": ([{"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n#### 72"}], [("How many?", "72")]),
    "aime_2024": ([{"id": "60", "problem": "P", "answer": "204", "source": "s"}], [("P", "204")]),
    "aime_2025": ([{"id": "1", "problem": "P", "answer": 70}], [("P", "70")]),
    "beyond_aime": ([{"problem": "P", "answer": 7}], [("P", "7")]),
    "brumo_2025": ([{"problem": "P\n", "answer": "2^{99}"}], [("P", "2^{99}")]),
    "hmmt_feb_2025": ([{"problem": "P", "answer": "103"}], [("P", "103")]),
    "math_500": ([{"problem": "P", "answer": "\\left( 3 \\right)", "level": 2}], [("P", "\\left( 3 \\right)")]),
    "polaris": ([{"problem": "P", "answer": "5", "difficulty": "3/8"}], [("P", "5")]),
    "question_answer": ([{"question": "Q", "answer": "A"}], [("Q", "A")]),
    "problem_answer": ([{"problem": "Q", "answer": "A"}], [("Q", "A")]),
}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_schema(name: str, kind: str, tmp_path: Path) -> None:
    rows, expected = ROWS[name]
    source, out = tmp_path / f"rows.{kind}", tmp_path / "out.jsonl"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert main([name, str(source), "--out", str(out), "--split", "eval"]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["question"], one["answer"]) for one in written] == expected
    assert {(one["source"], one["environment"], one["split"]) for one in written} == {(name, "math_python", "eval")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"question": "Q"}', "row 1"),
        ('{"question": "Q", "answer": " "}', "an empty answer"),
        ('{"question": "Q", "answer": "A"}\n{', "line 2"),
        ("[1]", "row 1"),
    ],
)
def test_a_bad_row_is_named(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    assert main(["question_answer", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_a_row_with_an_empty_answer_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "Q", "answer": ""}, {"question": "R", "answer": "A"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["question_answer", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert [json.loads(line)["question"] for line in (tmp_path / "out").read_text().splitlines()] == ["R"]
    assert "1 rows left out, the first: question_answer, row 1: an empty answer" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("question_answer", {"question": "Q", "answer": None}, {"question": "R", "answer": "A"}),
        ("question_answer", {"question": None, "answer": "A"}, {"question": "R", "answer": "A"}),
        ("question_answer", {"question": "Q", "answer": math.nan}, {"question": "R", "answer": 7.5}),
        ("math", {"prompt": chat("Q", "A")["prompt"], "reward_model": None}, chat("R", "A")),
        ("gsm8k", {"question": "Q", "answer": "48/2 = 24, so 72"}, {"question": "R", "answer": "so\n#### 72"}),
    ],
    ids=["answer", "question", "nan", "part of the path", "mark"],
)
def test_a_row_whose_answer_is_not_there_is_left_out(
    name: str, bad: dict[str, Any], good: dict[str, Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Null, which is common in Parquet, is neither the text None nor a reason to give the data set up."""
    source, out = tmp_path / f"rows.{kind}", tmp_path / "out.jsonl"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good, bad]), source)
    else:
        source.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    assert main([name, str(source), "--out", str(out)]) == 0
    assert [json.loads(line)["question"] for line in out.read_text().splitlines()] == ["R"]
    assert f"1 rows left out, the first: {name}, row 2: an " in capsys.readouterr().err


def test_tasks_of_reasoning_gym_by_name(tmp_path: Path) -> None:
    assert main(["reasoning_gym:basic_arithmetic:5:1", "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert {(row["environment"], row["source"]) for row in rows} == {
        ("reasoning_gym", "reasoning_gym/basic_arithmetic")
    }
    assert len(rows) == 5


@pytest.mark.parametrize("name", ["no_such", "reasoning_gym:basic_arithmetic", "reasoning_gym:no_such:1:1"])
def test_an_unknown_name_is_told(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--out", str(tmp_path / "out")]) == 2
    assert name.split(":")[0] in capsys.readouterr().err


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("a,b")
    assert main(["gsm8k", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "neither .jsonl nor .parquet" in capsys.readouterr().err


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
    assert data_source
    assert extra_info["question"] == "Q"
    return {"score": 1.0 if ground_truth in solution_str else -1.0, "acc": True}


def length_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [min(1.0, len(text) / 10) if truth in text else 0.0 for text, truth in zip(completions, answer, strict=True)]


def no_number(**_: Any) -> float:
    return math.nan


def no_numbers(**_: Any) -> list[float]:
    return [math.nan]


def two_rewards(completions: list[str], **_: Any) -> list[float]:
    return [0.0, 1.0]


async def compute_score_later(**columns: Any) -> dict[str, Any]:
    await asyncio.sleep(0)
    return compute_score(**columns)


async def length_reward_later(**columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return length_reward(**columns)


@pytest.mark.parametrize(
    ("name", "text", "reward"),
    [
        ("verl:{}:compute_score_later", "it is 42", 1.0),
        ("verl:{}:compute_score_later", "no", 0.0),
        ("trl:{}:length_reward_later", "is 42", 0.5),
        ("verl:{}:compute_score", "it is 42", 1.0),
        ("verl:{}:compute_score", "no", 0.0),
        ("trl:{}:length_reward", "is 42", 0.5),
    ],
)
async def test_reward_functions_of_other_stacks(name: str, text: str, reward: float) -> None:
    grader = load_grader(name.format(__name__))
    assert await apply_grader(grader, Response("Q", "42", text, text)) == reward


@pytest.mark.parametrize("name", ["verl:{}:no_number", "trl:{}:no_numbers"])
async def test_a_score_that_is_no_number_is_not_taken_for_0(name: str) -> None:
    """So it fails its trajectory as any bad reward does, and is no evidence."""
    assert math.isnan(await apply_grader(load_grader(name.format(__name__)), Response("Q", "42", "x", "x")))


async def test_a_trl_function_that_miscounts_fails_its_trajectory() -> None:
    with pytest.raises(ValueError, match="one number a completion"):
        await apply_grader(load_grader(f"trl:{__name__}:two_rewards"), Response("Q", "42", "x", "x"))


async def test_reasoning_gym() -> None:
    environment = make_environment("reasoning_gym", character_tokenizer())
    for prompt in entries("basic_arithmetic", 3, seed=1):
        truth = json.loads(prompt["answer"])["entry"]["answer"]
        right = f"So \\boxed{{{truth}}}"
        assert await environment.grade(Response(prompt["question"], prompt["answer"], right, right)) == 1.0
        assert await environment.grade(Response(prompt["question"], prompt["answer"], "", "\\boxed{x}")) < 1.0
        assert prompt["question"] in environment.prompt(prompt["question"])
