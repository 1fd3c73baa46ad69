"""The interface of a task: make the prompt, answer a turn, grade the response.

An environment with a tool names its closing tag in `stop`, and runs what the turn asks for in `step`. One without
leaves both alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from services.rollout.graders import Grader, Response, apply_grader


@dataclass(frozen=True)
class Turn:
    """One finished model turn.

    Args:
        text: what the model wrote, special tokens left out.
        ended: ``tool`` if one of the environment's stop strings ended it, ``end`` if the model ended its answer.
        question: the task.
        answer: its ground truth, for an environment that plays against the model.
        number: of this turn, from 0.
    """

    text: str
    ended: Literal["tool", "end"]
    question: str = ""
    answer: str = ""
    number: int = 0


class Tools(Protocol):
    """What a turn may run."""

    async def run(self, code: str) -> str:
        """Run Python and return what the model is shown of the outcome, truncated.

        Raises `singlestream.errors.SandboxError` for a fault that is not the code's.
        """
        ...


class Environment(ABC):
    """A task. One object serves all episodes of a replica; it keeps nothing between them.

    Args:
        tokenizer: the model's tokenizer.
        grader: turns the response into the reward.
    """

    name: str
    default_grader: str = "boxed"
    """Grader where the lease names none (`graders.load_grader`)."""
    stop: tuple[str, ...] = ()
    """Strings that end a turn so that `step` may answer it."""
    uses_sandbox: bool = False
    """Whether `step` runs code: a lease that has failed once then waits until the sandbox gateway is well."""

    def __init__(self, tokenizer: Any, grader: Grader) -> None:
        self.tokenizer, self.grader = tokenizer, grader

    @abstractmethod
    def prompt(self, question: str) -> str:
        """Text of the one user message."""

    def reset(self, question: str) -> list[int]:
        """Token ids of the prompt, up to where the model goes on."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": self.prompt(question)}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    async def step(self, turn: Turn, tools: Tools) -> str | None:
        """Text to append after the turn; None ends the episode."""
        return None

    async def grade(self, response: Response) -> float:
        """Reward in [0, 1]. What it raises fails this one trajectory."""
        return await apply_grader(self.grader, response)
