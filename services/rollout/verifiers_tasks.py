"""Tasksets of `verifiers` (PyPI ``verifiers`` 0.4, ``verifiers.v1``) as prompts and as a grader.

A taskset yields tasks; a task has a prompt and scores a trace of messages with its ``@reward`` methods. What is taken
of it is what needs no runtime: tasks with one user prompt, and their rewards, metrics and judges that score offline.
Tools and code come from our own environments: a taskset's own toolsets, containers and harnesses are refused.

A prompt's answer is the task's stable key, by which the grader finds the task again. Nothing here is imported without
the package, which is installed by whoever uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from services.rollout.graders import Response
from singlestream.errors import ConfigError


def tasks_of(make_taskset: Callable[[], Any]) -> Iterator[Any]:
    """The tasks of the taskset that a function without arguments makes.

    Raises:
        ConfigError: it never ends, or a task needs what only a runtime of verifiers has; names the task.
    """
    taskset = make_taskset()
    if not taskset.bounded:
        raise ConfigError(f"{type(taskset).__name__} never ends: give its view an end with take(n)")
    for task in taskset:
        name = f"task {task.data.idx} of {type(taskset).__name__}"
        if task.NEEDS_CONTAINER or type(task).toolsets(task.config):
            raise ConfigError(f"{name} needs a container or toolsets of verifiers, which are not run here")
        roles = [message.role for message in task.data.prompt or [] if not isinstance(task.data.prompt, str)]
        if not task.data.prompt_text or set(roles) - {"user"}:
            raise ConfigError(f"{name} has no prompt that is one user's text")
        yield task


def entries(path: str) -> Iterator[dict[str, str]]:
    """Prompts of a taskset, ``package.module:function`` that makes it; a system prompt stands before the question."""
    module, _, function = path.partition(":")
    for task in tasks_of(getattr(importlib.import_module(module), function)):
        parts = (task.data.system_prompt, task.data.prompt_text)
        yield {
            "question": "\n\n".join(part for part in parts if part),
            "answer": task.key,
            "source": path,
            "environment": f"single_turn/verifiers:{path}",
        }


def from_verifiers(make_taskset: Callable[[], Any]) -> Callable[[Response], Awaitable[float]]:
    """The tasks' own score of a response: their weighted rewards' sum, at least 0; above 1 the trajectory fails."""
    tasks = {task.key: task for task in tasks_of(make_taskset)}

    async def grade(response: Response) -> float:
        import verifiers.v1 as vf

        task = tasks[response.answer]
        said = (vf.UserMessage(content=response.question), vf.AssistantMessage(content=response.text))
        trace = vf.Trace(
            task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            nodes=[
                vf.MessageNode(message=said[0]),
                vf.MessageNode(parent=0, message=said[1], sampled=True),
            ],
        )
        await task.score(trace)
        if not trace.rewards or any(reward is None for reward in trace.rewards.values()):
            raise ValueError(f"task {response.answer}: no reward that can be scored without a runtime")
        return max(float(trace.reward), 0.0)  # in this order NaN stays, and fails its trajectory

    return grade
