r"""Rules that turn a response into a reward of 0 or 1.

`boxed_strict` is the reference recipe's rule to the letter (SPO, arXiv 2509.13232, and its recipe in verl): exact
strings, so that ``1/2`` is not ``\frac{1}{2}`` and ``023`` is not ``23``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from singlestream.errors import ConfigError

BOX = "\\boxed{"
LAST_CHARS, BOX_CHARS = 300, 100
"""Windows at the end of the response in which the reference looks for the answer; the second lies within the first."""


@dataclass(frozen=True)
class Response:
    """What a grader sees of an episode.

    Args:
        question: the task.
        answer: the ground truth.
        text: everything after the prompt, observations included, without special tokens.
        last_turn: what the model itself wrote last.
    """

    question: str
    answer: str
    text: str
    last_turn: str


Grader = Callable[[Response], float]


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}``, braces balanced; None if there is none or the last one is not closed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(BOX) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(BOX) : position]
    return None


def boxed_matches(text: str, answer: str) -> bool:
    r"""Whether the last ``\boxed{…}`` within the last 100 of the last 300 characters is exactly ``answer``."""
    return last_boxed(text[-LAST_CHARS:][-BOX_CHARS:]) == answer


def boxed(response: Response) -> float:
    """1 if the model's last turn boxes the answer, for models that do not think aloud.

    A tool's output cannot earn it.
    """
    return float(boxed_matches(response.last_turn, response.answer))


def boxed_strict(response: Response) -> float:
    """The reference's rule: exactly one ``</think>``, no tool tag after it, and the answer boxed at the end; else 0."""
    parts = response.text.split("</think>")
    if len(parts) != 2:
        return 0.0
    if "<code>" in parts[1] or "<interpreter>" in parts[1]:
        return 0.0
    return float(boxed_matches(response.text, response.answer))


GRADERS: dict[str, Grader] = {"boxed": boxed, "boxed_strict": boxed_strict}


def load_grader(name: str) -> Grader:
    """A grader by its name in `GRADERS`, or by dotted path ``package.module:function``.

    Raises:
        ConfigError: there is no such grader.
    """
    if name in GRADERS:
        return GRADERS[name]
    module, _, function = name.partition(":")
    try:
        grader: Grader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(GRADERS)
        raise ConfigError(f"grader {name!r}: not one of {known}, and no package.module:function: {error}") from error
    return grader
