r"""Rules that turn a response into a reward of 0 or 1.

`boxed_strict` is the reference recipe's rule to the letter (SPO, arXiv 2509.13232, and its recipe in verl): exact
strings, so that ``1/2`` is not ``\frac{1}{2}`` and ``023`` is not ``23``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.rollout.grader_threads import in_time, shared_threads
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
        source: data set that the prompt came from.
    """

    question: str
    answer: str
    text: str
    last_turn: str
    source: str = "default"


Grader = Callable[[Response], float | Awaitable[float]]


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


def exact(response: Response) -> float:
    """1 if the model's last turn is the answer and nothing else, but for white space around it."""
    return float(response.last_turn.strip() == response.answer)


async def math_verify(response: Response) -> float:
    """1 if the boxed answer of the last turn is mathematically equal to the truth (`math_pool`).

    One that cannot be compared within its deadline is not.
    """
    from services.rollout.math_pool import shared_pool

    answer = last_boxed(response.last_turn)
    return float(answer is not None and await shared_pool().equal(response.answer, answer))


GRADERS: dict[str, Grader] = {
    "boxed": boxed,
    "boxed_strict": boxed_strict,
    "exact": exact,
    "math_verify": math_verify,
}


async def apply_grader(grader: Grader, response: Response) -> float:
    """Call a grader without holding up the event loop.

    The rules of this module take microseconds, or keep a deadline of their own, and are called at once; a user's
    function gets a thread, unless it is asynchronous.

    Raises:
        DeadlineExceeded: a user's took longer than `grader_threads.TIMEOUT_S`.
        GradersHang: likewise, and so many hang that the process must be replaced.
        Exception: whatever the grader raises.
    """
    threads, ours = shared_threads(), grader in GRADERS.values()
    if ours or inspect.iscoroutinefunction(grader):
        reward = grader(response)
    else:
        reward = await threads.call(grader, response)
    if inspect.isawaitable(reward):
        reward = await (reward if ours else in_time(reward, grader, threads.timeout_s))
    return float(reward)


def load_grader(name: str) -> Grader:
    """A grader by its name in `GRADERS`, or by dotted path ``package.module:function``.

    A path with ``verl:``, ``trl:`` or ``verifiers:`` before it names a function of those stacks (`adapters`).

    Raises:
        ConfigError: there is no such grader.
    """
    if name in GRADERS:
        return GRADERS[name]
    from services.rollout.adapters import ADAPTERS  # which are graders, made with this module

    kind, _, path = name.partition(":")
    kind, path = (kind, path) if kind in ADAPTERS else ("", name)
    module, _, function = path.partition(":")
    try:
        grader: Grader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(GRADERS)
        raise ConfigError(f"grader {name!r}: not one of {known}, and no package.module:function: {error}") from error
    return ADAPTERS[kind](grader) if kind else grader
