"""Reward functions of other stacks as graders: ``verl:package.module:function``, ``trl:…``, ``verifiers:…``.

A verl function is called as ``compute_score(data_source, solution_str, ground_truth, extra_info)`` and may return a
number or a dict with ``score``; a TRL function as ``f(prompts=[…], completions=[…], **columns)`` and returns a list.
For verifiers the function makes a taskset, whose tasks score (`verifiers_tasks`).
Scores below 0, such as verl's −1 for a wrong answer, become 0 here, because a posterior's rewards lie in [0, 1]; above
1 the trajectory fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any

from services.rollout.graders import Grader, Response
from services.rollout.verifiers_tasks import from_verifiers


def from_verl(compute_score: Callable[..., Any]) -> Grader:
    """Verl's custom reward function."""

    @wraps(compute_score)
    def grade(response: Response) -> float | Awaitable[float]:
        score = compute_score(
            data_source=response.source,
            solution_str=response.text,
            ground_truth=response.answer,
            extra_info={"question": response.question},
        )
        return _then(score, lambda told: _at_least_0(told["score"] if isinstance(told, Mapping) else told))

    return grade


def from_trl(reward: Callable[..., Any]) -> Grader:
    """TRL's reward function, called with a batch of one and the columns ``answer`` and ``ground_truth``."""

    def the_one(scores: Any) -> float:
        if len(scores) != 1 or scores[0] is None:
            raise ValueError(f"a TRL reward function returns one number a completion, not {scores!r}")
        return _at_least_0(scores[0])

    @wraps(reward)
    def grade(response: Response) -> float | Awaitable[float]:
        scores = reward(
            prompts=[response.question],
            completions=[response.text],
            answer=[response.answer],
            ground_truth=[response.answer],
        )
        return _then(scores, the_one)

    return grade


def _then(told: Any, number: Callable[[Any], float]) -> float | Awaitable[float]:
    """The number that a function's answer comes to, be it asynchronous."""

    async def later() -> float:
        return number(await told)

    return later() if inspect.isawaitable(told) else number(told)


def _at_least_0(score: Any) -> float:
    return max(float(score), 0.0)  # in this order NaN stays, and fails its trajectory


ADAPTERS: dict[str, Callable[[Callable[..., Any]], Grader]] = {
    "verl": from_verl,
    "trl": from_trl,
    "verifiers": from_verifiers,
}
"""Prefix of a grader's name → what makes a grader of that stack's function."""
