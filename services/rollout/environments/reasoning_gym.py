"""Tasks of reasoning-gym (PyPI ``reasoning-gym``): generated puzzles with their own verifiers.

A prompt's answer is the JSON ``{"dataset": NAME, "entry": {…}}``, as `entries` writes it, because the verifiers grade
against the whole entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from services.rollout.environments.single_turn import SingleTurn
from services.rollout.graders import Response, last_boxed


def entries(dataset: str, size: int, seed: int) -> Iterator[dict[str, str]]:
    """Prompts of one generator: question, answer, source and environment of each."""
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(dataset, size=size, seed=seed):
        yield {
            "question": entry["question"],
            "answer": json.dumps({"dataset": dataset, "entry": entry}, default=str),
            "source": f"reasoning_gym/{dataset}",
            "environment": ReasoningGym.name,
        }


def verify(response: Response) -> float:
    """The generator's own score of the boxed answer, or of the whole last turn where nothing is boxed."""
    import reasoning_gym

    truth = json.loads(response.answer)
    answer = last_boxed(response.last_turn)
    score = reasoning_gym.get_score_answer_fn(truth["dataset"])
    return float(score(answer=response.last_turn.strip() if answer is None else answer, entry=truth["entry"]))


class ReasoningGym(SingleTurn):
    """One puzzle, one answer, boxed."""

    name = "reasoning_gym"
    default_grader = "services.rollout.environments.reasoning_gym:verify"

    def prompt(self, question: str) -> str:
        """The puzzle and the demand for a box."""
        return f"{question}\n\nGive the final answer in \\boxed{{}}."
