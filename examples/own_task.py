"""A task of one's own, whole: a grader, an environment, and reward functions as verl and TRL write them.

Prompts name them by dotted path, from the folder in which `singlestream up` runs (docs/own_task.md).
"""

from __future__ import annotations

import re
from typing import Any

from services.rollout.environments import Environment, Tools, Turn
from services.rollout.graders import Response, last_boxed

CALL = re.compile(r"<code>print\((\d+)\*(\d+)\)</code>")


def right_digits(response: Response) -> float:
    """Share of the answer's digits that the box in the model's last turn has in their places: a reward in [0, 1]."""
    boxed = last_boxed(response.last_turn) or ""
    if len(boxed) != len(response.answer):
        return 0.0
    return sum(a == b for a, b in zip(boxed, response.answer, strict=True)) / len(boxed)


class Calculator(Environment):
    """Answers ``<code>print(a*b)</code>`` itself: a tool without a sandbox, which knows one operation."""

    name = "calculator"
    default_grader = "examples.own_task:right_digits"
    stop = ("</code>",)

    def prompt(self, question: str) -> str:
        """The one user message."""
        return question

    async def step(self, turn: Turn, tools: Tools) -> str | None:
        """What is appended after the model's turn; None ends the episode."""
        if turn.ended != "tool":
            return None
        call = CALL.search(turn.text)
        shown = int(call[1]) * int(call[2]) if call else "?"
        return f"<interpreter>{shown}</interpreter>"


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """The reward as verl calls it: ``verl:examples.own_task:compute_score``."""
    return 1.0 if last_boxed(solution_str) == ground_truth else -1.0


def box_reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward as TRL calls it: ``trl:examples.own_task:box_reward``."""
    return [float(last_boxed(text) == truth) for text, truth in zip(completions, answer, strict=True)]
