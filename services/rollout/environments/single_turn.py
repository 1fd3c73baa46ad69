"""One question, one answer, no tool."""

from __future__ import annotations

from services.rollout.environments.base import Environment


class SingleTurn(Environment):
    """The question as the user's message; the model's first turn is its answer."""

    name = "single_turn"

    def prompt(self, question: str) -> str:
        """The question as it is."""
        return question
