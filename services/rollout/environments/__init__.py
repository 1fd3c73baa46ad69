"""Tasks that episodes run, by name."""

from __future__ import annotations

import importlib
from typing import Any

from services.rollout.environments.base import Environment, Tools, Turn
from services.rollout.environments.math_python import MathPython
from services.rollout.environments.reasoning_gym import ReasoningGym
from services.rollout.environments.single_turn import SingleTurn
from services.rollout.environments.tiny_tool import TinyTool
from services.rollout.graders import load_grader
from singlestream.errors import ConfigError

ENVIRONMENTS: dict[str, type[Environment]] = {
    kind.name: kind for kind in (MathPython, TinyTool, SingleTurn, ReasoningGym)
}
"""The environments that have a name; others are named by ``package.module:Class``."""


def make_environment(name: str, tokenizer: Any) -> Environment:
    """An environment by its name, optionally with a grader: ``math_python`` or ``math_python/package.module:function``.

    Raises:
        KeyError: there is no environment of that name.
        ConfigError: there is no such class, or no such grader.
    """
    base, _, grader = name.partition("/")
    kind = _by_path(base) if ":" in base else ENVIRONMENTS[base]
    return kind(tokenizer, load_grader(grader or kind.default_grader))


def _by_path(path: str) -> type[Environment]:
    module, _, name = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"environment {path!r}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Environment)):
        raise ConfigError(f"environment {path!r}: not a subclass of services.rollout.environments.Environment")
    return kind


__all__ = ["ENVIRONMENTS", "Environment", "Tools", "Turn", "make_environment"]
