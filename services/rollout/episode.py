"""One episode: generating ⇄ running tools → over, or unfinished where the replica has to stop.

The state is a list of segments, so what is handed over, what is trained on and what the engine is asked to continue are
the same thing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, TypeVar

from services.rollout.environments import Environment, Tools, Turn
from services.rollout.generation import Engine, EngineDead, Generation, GenerationRequest
from services.rollout.graders import Response
from singlestream.config import RolloutConfig
from singlestream.contracts import EndReason, Lease, Progress, Segment, ToolCall
from singlestream.errors import SinglestreamError

T = TypeVar("T")

ABORT_TIMEOUT_S = 30.0
"""An aborted request returns within one engine step; later than this the engine is hung."""


class PromptTooLong(SinglestreamError):
    """The prompt leaves no room for a response in the engine's context."""


class NothingSampled(SinglestreamError):
    """The episode's wall time passed before the engine sampled its first token."""


class ToolBudgetSpent(Exception):
    """The turn asks for more tool calls than the episode may make."""


@dataclass(frozen=True)
class Finished:
    """An episode that ended by itself; the reward is still to come."""

    lease: Lease
    segments: list[Segment]
    end_reason: EndReason
    turns: int
    tool_calls: list[ToolCall]
    started_at_s: float
    decode: Callable[[list[int]], str]

    @cached_property
    def response(self) -> Response:
        """What a grader sees. Decoding takes a while, so it is left until the episode is out of its slot."""
        tokens, last_turn = _tokens(self.segments[1:]), _last_generated(self.segments)
        text = self.decode(tokens)
        return Response(
            question=self.lease.question,
            answer=self.lease.answer,
            text=text,
            last_turn=text if last_turn == tokens else self.decode(last_turn),
            source=self.lease.source,
        )


class ToolRunner(Tools):
    """A `Tools` that also records its calls."""

    calls: list[ToolCall]
    turn: int


class Episode:
    """Runs one lease from where it stands.

    Args:
        lease: what to run; its ``progress`` is continued.
        environment: poses, answers and (later) grades.
        engine: samples.
        tools: runs code; its ``calls`` must hold only this episode's calls.
        limits: turns, tokens, tool calls and wall time.
        replica: name written into the generated segments.
        interrupt: once set, the episode stops at the next token and `run` returns its progress.
    """

    def __init__(
        self,
        lease: Lease,
        environment: Environment,
        engine: Engine,
        tools: ToolRunner,
        limits: RolloutConfig,
        replica: str,
        interrupt: asyncio.Event,
    ) -> None:
        self.lease, self.environment, self.engine, self.tools = lease, environment, engine, tools
        self.limits, self.replica, self.interrupt = limits, replica, interrupt
        progress = lease.progress
        self.segments = list(progress.segments) if progress else []
        self.turns = progress.turns if progress else 0
        self.started_at_s = progress.started_at_s if progress else time.time()
        self.tools.calls = list(progress.tool_calls) if progress else []
        self._recorded_calls = len(self.tools.calls)
        ends_generated = bool(self.segments) and self.segments[-1].kind == "generated"
        self._turn_over = ends_generated and self.turns == _generated_runs(self.segments)

    @property
    def progress(self) -> Progress:
        """Where the episode stands: everything sampled and observed.

        Calls of a turn whose observation is not there yet are left out.
        """
        return Progress(
            segments=self.segments,
            turns=self.turns,
            tool_calls=self.tools.calls[: self._recorded_calls],
            started_at_s=self.started_at_s,
        )

    async def run(self) -> Finished | Progress:
        """Run to an end, or to an interruption.

        Raises:
            PromptTooLong: there is no room for even one token.
            NothingSampled: the wall time passed before the first token.
            SandboxError: the sandbox failed; `progress` holds what was done before.
            EngineDead: likewise.
        """
        if not self.segments:
            self.segments.append(Segment(kind="prompt", token_ids=self.environment.reset(self.lease.question)))
        while True:
            if not self._turn_over:
                end = await self._sample_turn()
                if end == "interrupted":
                    return self.progress
                if end is not None:
                    return self._finished(end)
            outcome = await self._answer_turn()
            if outcome == "interrupted":
                return self.progress
            if outcome is not None:
                return self._finished(outcome)

    @property
    def _room(self) -> int:
        """Tokens that may still follow."""
        total = sum(len(segment.token_ids) for segment in self.segments)
        response = total - len(self.segments[0].token_ids)
        return min(self.limits.max_response_tokens - response, self.limits.max_model_tokens - total)

    @property
    def _seconds_left(self) -> float:
        return self.started_at_s + self.limits.episode_deadline_s - time.time()

    async def _sample_turn(self) -> EndReason | Literal["interrupted"] | None:
        """Sample until the turn is over; None if it is, else why the episode stops here."""
        room = self._room
        if room < 1:
            if len(self.segments) == 1:
                raise PromptTooLong(
                    f"the prompt has {len(self.segments[0].token_ids)} tokens; "
                    f"rollout.max_model_tokens = {self.limits.max_model_tokens}"
                )
            return "length"
        generation, interrupted = await self._generate(room)
        self._append(generation)
        if generation.finish == "aborted":
            if not interrupted and not _generated_runs(self.segments):
                raise NothingSampled(f"no token in {self.limits.episode_deadline_s:.0f} s")
            return "interrupted" if interrupted else "deadline"
        self.turns += 1
        self._turn_over = True
        return "length" if generation.finish == "length" else None

    async def _generate(self, max_tokens: int) -> tuple[Generation, bool]:
        """Sample; at the deadline or an interruption, abort and keep what was sampled.

        Returns also whether it was an interruption.
        """
        request_id = f"{self.lease.lease_id}:{self.lease.attempts}:{self.turns}:{uuid.uuid4().hex[:8]}"
        prompt_ids = _tokens(self.segments)
        request = GenerationRequest(prompt_ids, self.lease.sampling, max_tokens, self.environment.stop)
        if self.interrupt.is_set() or self._seconds_left <= 0:
            return Generation([], [], [], "aborted"), self.interrupt.is_set()
        task = asyncio.create_task(self.engine.generate(request_id, request))
        try:
            if await self._wait(task):
                return task.result(), False
            interrupted = self.interrupt.is_set()
            await self.engine.abort(request_id)
            done, _ = await asyncio.wait({task}, timeout=ABORT_TIMEOUT_S)
            if not done:
                raise EngineDead(f"an aborted request did not return within {ABORT_TIMEOUT_S:.0f} s")
            return task.result(), interrupted
        finally:
            task.cancel()

    async def _wait(self, task: asyncio.Task[Any]) -> bool:
        """Wait for the task, the interruption or the deadline, whichever is first. Whether the task is done."""
        interrupt = asyncio.create_task(self.interrupt.wait())
        try:
            await asyncio.wait(
                {task, interrupt}, timeout=max(0.0, self._seconds_left), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            interrupt.cancel()
        return task.done()

    def _append(self, generation: Generation) -> None:
        for span in generation.spans:
            self.segments.append(
                Segment(
                    kind="generated",
                    token_ids=generation.token_ids[span.start : span.end],
                    logprobs=generation.logprobs[span.start : span.end],
                    version=span.version,
                    lineage=span.lineage,
                    replica=self.replica,
                )
            )

    async def _answer_turn(self) -> EndReason | Literal["interrupted"] | None:
        """Let the environment answer the finished turn; None if the model goes on, else why the episode stops here."""
        turn = self._last_turn()
        if self.turns >= self.limits.max_turns:
            return "max_turns" if turn.ended == "tool" else "stop"
        self.tools.turn = self.turns - 1
        del self.tools.calls[self._recorded_calls :]
        task = asyncio.create_task(_as_coroutine(self.environment.step(turn, self.tools)))
        try:
            if not await self._wait(task):
                return "interrupted" if self.interrupt.is_set() else "deadline"
            observation = task.result()
        except ToolBudgetSpent:
            return "max_turns"
        finally:
            task.cancel()
        if observation is None:
            return "stop"
        return self._observe(observation)

    def _observe(self, observation: str) -> EndReason | None:
        tokens = self.environment.tokenizer.encode(observation, add_special_tokens=False, split_special_tokens=True)
        room = self._room
        if room <= 0:
            return "length"
        self.segments.append(Segment(kind="observation", token_ids=tokens[:room]))
        self._recorded_calls = len(self.tools.calls)
        self._turn_over = False
        return "length" if len(tokens) >= room else None

    def _last_turn(self) -> Turn:
        tokens: list[int] = []
        for segment in reversed(self.segments):
            if segment.kind != "generated":
                break
            tokens[:0] = segment.token_ids.tolist()
        text = self._decode(tokens)
        ended: Literal["tool", "end"] = "tool" if self._ended_by_tool(tokens, text) else "end"
        return Turn(text, ended, self.lease.question, self.lease.answer, self.turns - 1)

    def _ended_by_tool(self, tokens: list[int], text: str) -> bool:
        """Whether a stop string ended the turn. The last token may run past it, by less than its own text."""
        if not self.environment.stop or tokens[-1] == self.environment.tokenizer.eos_token_id:
            return False
        before = self._decode(tokens[:-1])
        return any(text.count(stop) > before.count(stop) for stop in self.environment.stop)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.environment.tokenizer.decode(tokens, skip_special_tokens=True))

    def _finished(self, end_reason: EndReason) -> Finished:
        calls = self.tools.calls[: self._recorded_calls] if end_reason == "deadline" else list(self.tools.calls)
        turns = max(1, self.turns)
        return Finished(self.lease, self.segments, end_reason, turns, calls, self.started_at_s, self._decode)


def _tokens(segments: Iterable[Segment]) -> list[int]:
    return list(chain.from_iterable(segment.token_ids.tolist() for segment in segments))


def _last_generated(segments: Sequence[Segment]) -> list[int]:
    """Tokens of the last run of generated segments, wherever it stands."""
    tokens: list[int] = []
    for segment in reversed(segments):
        if segment.kind == "generated":
            tokens[:0] = segment.token_ids.tolist()
        elif tokens:
            break
    return tokens


async def _as_coroutine(step: Coroutine[Any, Any, T]) -> T:
    return await step


def _generated_runs(segments: list[Segment]) -> int:
    """Model turns begun: maximal runs of generated segments."""
    runs, previous = 0, "prompt"
    for segment in segments:
        runs += segment.kind == "generated" and previous != "generated"
        previous = segment.kind
    return runs
