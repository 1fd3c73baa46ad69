"""Tasks that episodes run, by name."""

from __future__ import annotations

from typing import Any

from services.rollout.environments.base import Environment, Tools, Turn
from services.rollout.environments.math_python import MathPython
from services.rollout.environments.reasoning_gym import ReasoningGym
from services.rollout.environments.single_turn import SingleTurn
from services.rollout.environments.tiny_tool import TinyTool
from services.rollout.graders import load_grader

ENVIRONMENTS: dict[str, tuple[type[Environment], str]] = {
    MathPython.name: (MathPython, "boxed_strict"),
    TinyTool.name: (TinyTool, "boxed"),
    SingleTurn.name: (SingleTurn, "boxed"),
    ReasoningGym.name: (ReasoningGym, "services.rollout.environments.reasoning_gym:verify"),
}
"""Name → class and the grader it uses unless the name says another one."""


def make_environment(name: str, tokenizer: Any) -> Environment:
    """An environment by its name, optionally with a grader: ``math_python`` or ``math_python/package.module:function``.

    Raises:
        KeyError: there is no environment of that name.
        ConfigError: there is no such grader.
    """
    base, _, grader = name.partition("/")
    kind, default_grader = ENVIRONMENTS[base]
    return kind(tokenizer, load_grader(grader or default_grader))


__all__ = ["ENVIRONMENTS", "Environment", "Tools", "Turn", "make_environment"]
