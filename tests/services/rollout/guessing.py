"""An environment of a user's own: the model guesses a number and is told whether it is higher."""

from __future__ import annotations

import re

from services.rollout.environments import Environment, Tools, Turn
from services.rollout.graders import Response

GUESS = re.compile(r"<guess>(-?\d+)</guess>")


class Guessing(Environment):
    """The answer of a prompt is the number; the reward falls with every guess."""

    name = "guessing"
    default_grader = f"{__name__}:few_guesses"
    stop = ("</guess>",)

    def prompt(self, question: str) -> str:
        """The range, and how to guess."""
        return f"{question} Guess with <guess>n</guess>; you are told whether the number is higher or lower."

    async def step(self, turn: Turn, tools: Tools) -> str | None:
        """Compare the last guess; a hit, or a turn without a guess, ends the episode."""
        guesses = GUESS.findall(turn.text)
        if turn.ended != "tool" or not guesses or int(guesses[-1]) == int(turn.answer):
            return None
        return "\nhigher\n" if int(guesses[-1]) < int(turn.answer) else "\nlower\n"


def few_guesses(response: Response) -> float:
    """1 for a hit with the first guess, 1/2 with the second, …; 0 without one."""
    guesses = [int(text) for text in GUESS.findall(response.text)]
    return 1 / len(guesses) if guesses and guesses[-1] == int(response.answer) else 0.0
