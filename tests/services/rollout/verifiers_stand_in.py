"""The part of ``verifiers.v1`` (0.4) that `services.rollout.verifiers_tasks` and a taskset use, by its names and rules.

The tests use the package itself where it is installed; it pins other versions of what the services need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict


class TaskData(BaseModel):
    model_config = ConfigDict(frozen=True)
    idx: int | None = None
    prompt: Any = None
    system_prompt: str | None = None

    @property
    def prompt_text(self) -> str:
        return self.prompt or ""


D = TypeVar("D")


def reward(weight: float = 1.0) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        function.weight = weight
        return function

    return mark


class Task(Generic[D]):
    NEEDS_CONTAINER = False

    def __init__(self, data: Any, config: Any = None) -> None:
        self.data, self.config = data, config

    @property
    def key(self) -> str:
        wire = self.data.model_dump(mode="json", exclude_none=True)
        return hashlib.sha256(json.dumps(wire, sort_keys=True).encode()).hexdigest()

    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return []

    async def score(self, trace: Trace, runtime: Any = None) -> None:
        for name in dir(type(self)):
            if hasattr(getattr(type(self), name), "weight"):
                function = getattr(self, name)
                trace.rewards[name] = function.weight * await function(trace)


C = TypeVar("C")


class Taskset(Generic[D, C]):
    INFINITE = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def bounded(self) -> bool:
        return not self.INFINITE

    def __iter__(self) -> Iterator[Any]:
        for idx, task in enumerate(self.load()):  # type: ignore[attr-defined]
            task.data = task.data.model_copy(update={"idx": idx})
            yield task


@dataclass
class TasksetConfig:
    id: str = ""
    task: Any = None


@dataclass
class AgentConfig:
    pass


@dataclass
class AgentInfo:
    config: AgentConfig


@dataclass
class TraceTask:
    type: str
    data: Any
    key: str


@dataclass
class UserMessage:
    content: str
    role: str = "user"


@dataclass
class AssistantMessage:
    content: str
    role: str = "assistant"


@dataclass
class MessageNode:
    message: Any
    parent: int | None = None
    sampled: bool = False


@dataclass
class Trace:
    task: TraceTask
    agent: AgentInfo
    nodes: list[MessageNode]
    rewards: dict[str, float | None] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        return sum(value for value in self.rewards.values() if value is not None)

    @property
    def last_reply(self) -> str:
        return str([node.message.content for node in self.nodes if node.sampled][-1]).strip()
