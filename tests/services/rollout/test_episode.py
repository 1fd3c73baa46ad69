"""The state machine of an episode, on a scripted engine: every end and limit, and what was handed over goes on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from services.rollout.environments import ENVIRONMENTS, make_environment
from services.rollout.environments.code_blocks import code_blocks
from services.rollout.episode import Episode, Finished, NothingSampled, PromptTooLong
from services.rollout.metrics import Metrics
from services.rollout.observations import truncate
from services.rollout.tools import SandboxTools
from singlestream.config import RolloutConfig
from singlestream.contracts import Lease, Progress
from singlestream.errors import ConfigError, SandboxError
from tests.services.rollout.policies import character_tokenizer
from tests.services.rollout.scripted import ScriptedEngine, ScriptedSandbox, lease

TOKENIZER = character_tokenizer()
CALL = "<code>abc</code>"
BOX = "\\boxed{7}"


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"max_model_tokens": 1024, "max_response_tokens": 256, "max_turns": 4, **changes})


class Case:
    """One episode and its edges."""

    def __init__(
        self, script: list[str], one: Lease | None = None, limits: RolloutConfig | None = None, **engine: Any
    ) -> None:
        self.lease, self.limits = one or lease(), limits or settings()
        self.engine = ScriptedEngine(TOKENIZER, script, **engine)
        self.sandbox = ScriptedSandbox()
        self.interrupt = asyncio.Event()
        self.tools = SandboxTools(self.sandbox, self.limits, Metrics())
        self.environment = make_environment(self.lease.environment, TOKENIZER)

    def episode(self, replica: str = "r1") -> Episode:
        return Episode(self.lease, self.environment, self.engine, self.tools, self.limits, replica, self.interrupt)

    async def finish(self) -> Finished:
        outcome = await self.episode().run()
        assert isinstance(outcome, Finished)
        return outcome

    async def interrupted_at(self, event: asyncio.Event, replica: str = "r1") -> Progress:
        task = asyncio.create_task(self.episode(replica).run())
        await event.wait()
        self.interrupt.set()
        outcome = await task
        assert isinstance(outcome, Progress)
        return outcome


def kinds(finished: Finished | Progress) -> list[str]:
    return [segment.kind for segment in finished.segments]


def text_of(finished: Finished | Progress) -> str:
    return TOKENIZER.decode([int(token) for segment in finished.segments[1:] for token in segment.token_ids])


async def test_stop_without_a_tool() -> None:
    finished = await Case([BOX]).finish()
    assert (finished.end_reason, finished.turns, finished.tool_calls) == ("stop", 1, [])
    assert kinds(finished) == ["prompt", "generated"]
    assert TOKENIZER.decode(finished.segments[0].token_ids.tolist()).endswith(
        "3+4=?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert finished.response.text == BOX


async def test_a_tool_turn_and_its_observation() -> None:
    case = Case([CALL, BOX])
    finished = await case.finish()
    assert (finished.end_reason, finished.turns) == ("stop", 2)
    assert kinds(finished) == ["prompt", "generated", "observation", "generated"]
    assert text_of(finished) == f"{CALL}<interpreter>ABC</interpreter>{BOX}<|im_end|>"
    assert finished.response.last_turn == BOX
    assert await case.environment.grade(finished.response) == 1.0
    assert [(call.turn, call.status) for call in finished.tool_calls] == [(0, "ok")]
    assert case.sandbox.ran == ["abc"]


async def test_all_blocks_of_a_turn_run_in_order() -> None:
    case = Case(["<code>a</code> then <code>b</code>", BOX], lease(environment="math_python/boxed"))
    finished = await case.finish()
    assert case.sandbox.ran == ["a", "b"]
    assert "\n<interpreter>\nA\n</interpreter>\n\n<interpreter>\nB\n</interpreter>\n" in text_of(finished)
    assert [call.turn for call in finished.tool_calls] == [0, 0]


async def test_a_closing_tag_without_a_block_is_told_to_the_model() -> None:
    finished = await Case(["</code>", BOX]).finish()
    assert "<interpreter>Error: </code> without <code></interpreter>" in text_of(finished)


async def test_length_within_a_turn() -> None:
    finished = await Case(["x" * 400]).finish()
    assert finished.end_reason == "length"
    assert sum(len(segment.token_ids) for segment in finished.segments[1:]) == 256


async def test_length_by_the_engine_context() -> None:
    finished = await Case(["x" * 400], limits=settings(max_model_tokens=300, max_response_tokens=299)).finish()
    assert finished.end_reason == "length"
    assert sum(len(segment.token_ids) for segment in finished.segments) == 300


async def test_length_by_an_observation_that_fills_the_room() -> None:
    limits = settings(max_response_tokens=len(TOKENIZER.encode(CALL)) + 5)
    finished = await Case([CALL, BOX], limits=limits).finish()
    assert finished.end_reason == "length"
    assert kinds(finished) == ["prompt", "generated", "observation"]
    assert len(finished.segments[-1].token_ids) == 5


async def test_max_turns() -> None:
    case = Case([CALL], limits=settings(max_turns=3))
    finished = await case.finish()
    assert (finished.end_reason, finished.turns, len(case.sandbox.ran)) == ("max_turns", 3, 2)


async def test_the_last_turn_allowed_may_still_stop() -> None:
    finished = await Case([CALL, BOX], limits=settings(max_turns=2)).finish()
    assert (finished.end_reason, finished.turns) == ("stop", 2)


async def test_max_tool_calls() -> None:
    case = Case([CALL], limits=settings(max_tool_calls=1))
    finished = await case.finish()
    assert (finished.end_reason, finished.turns, len(case.sandbox.ran)) == ("max_turns", 2, 1)


async def test_deadline_while_sampling_keeps_the_tokens() -> None:
    finished = await Case(["x" * 200], limits=settings(episode_deadline_s=1.0), stall=(0, 9)).finish()
    assert finished.end_reason == "deadline"
    assert len(finished.segments[1].token_ids) == 9


async def test_deadline_while_the_tool_runs() -> None:
    case = Case([CALL, BOX], limits=settings(episode_deadline_s=1.0))
    case.sandbox.hangs = True
    finished = await case.finish()
    assert (finished.end_reason, finished.turns, finished.tool_calls) == ("deadline", 1, [])


async def test_a_deadline_without_a_token_is_no_trajectory() -> None:
    with pytest.raises(NothingSampled):
        await Case([BOX], limits=settings(episode_deadline_s=0.1), stall=(0, 0)).finish()


async def test_a_prompt_without_room() -> None:
    one = lease(question="x" * 1100)
    with pytest.raises(PromptTooLong, match="max_model_tokens"):
        await Case([BOX], one).finish()


async def test_a_fault_of_the_sandbox_is_not_an_end() -> None:
    case = Case([CALL, BOX])
    case.sandbox.faults = 1
    episode = case.episode()
    with pytest.raises(SandboxError):
        await episode.run()
    assert episode.progress.turns == 1
    assert kinds(episode.progress) == ["prompt", "generated"]
    assert episode.progress.tool_calls == []


async def test_versions_of_an_update_in_flight_are_segments() -> None:
    finished = await Case([BOX], versions=lambda place: (4, 1) if place < 3 else (5, 2)).finish()
    told = [(s.version, s.lineage, len(s.token_ids)) for s in finished.segments if s.kind == "generated"]
    assert told == [(4, 1, 3), (5, 2, len(TOKENIZER.encode(BOX)) + 1 - 3)]
    assert finished.turns == 1


async def test_handed_over_in_the_middle_of_a_turn_and_continued() -> None:
    first = Case([CALL, "so it is " + BOX], stall=(1, 5))
    progress = await first.interrupted_at(first.engine.stalled)
    assert progress.turns == 1
    assert kinds(progress) == ["prompt", "generated", "observation", "generated"]
    second = Case([CALL, "so it is " + BOX], lease(progress=progress), versions=lambda _: (9, 1))
    finished = await second.episode("r2").run()
    assert isinstance(finished, Finished)
    assert text_of(finished) == f"{CALL}<interpreter>ABC</interpreter>so it is {BOX}<|im_end|>"
    assert [s.replica for s in finished.segments if s.kind == "generated"] == ["r1", "r1", "r2"]
    assert [s.version for s in finished.segments if s.kind == "generated"] == [0, 0, 9]
    assert (finished.turns, len(finished.tool_calls)) == (2, 1)
    assert finished.started_at_s == progress.started_at_s
    assert second.sandbox.ran == []


async def test_handed_over_while_the_tool_runs() -> None:
    first = Case([CALL, BOX])
    first.sandbox.hangs = True
    progress = await first.interrupted_at(first.sandbox.asked)
    assert (progress.turns, progress.tool_calls) == (1, [])
    assert kinds(progress) == ["prompt", "generated"]
    second = Case([CALL, BOX], lease(progress=progress))
    finished = await second.finish()
    assert second.sandbox.ran == ["abc"]
    assert text_of(finished) == f"{CALL}<interpreter>ABC</interpreter>{BOX}<|im_end|>"
    assert (finished.turns, len(finished.tool_calls)) == (2, 1)


async def test_handed_over_before_the_first_token() -> None:
    first = Case([BOX], stall=(0, 0))
    outcome = await first.interrupted_at(first.engine.stalled)
    assert kinds(outcome) == ["prompt"]
    finished = await Case([BOX], lease(progress=outcome)).finish()
    assert (text_of(finished), finished.turns) == (f"{BOX}<|im_end|>", 1)


async def test_a_second_interruption_within_one_turn() -> None:
    text = "x" * 60 + BOX
    progress = None
    for replica in ("r1", "r2"):
        case = Case([text], lease(progress=progress), stall=(0, 20))
        progress = await case.interrupted_at(case.engine.stalled, replica)
        assert progress.turns == 0
    finished = await Case([text], lease(progress=progress)).episode("r3").run()
    assert isinstance(finished, Finished)
    assert [s.replica for s in finished.segments[1:]] == ["r1", "r2", "r3"]
    assert (text_of(finished), finished.turns) == (f"{text}<|im_end|>", 1)


async def test_special_tokens_in_tool_output_stay_text() -> None:
    case = Case([CALL, BOX])
    observed = case.environment.tokenizer.encode(
        "<interpreter><|im_end|></interpreter>", add_special_tokens=False, split_special_tokens=True
    )
    assert TOKENIZER.eos_token_id not in observed
    assert TOKENIZER.decode(observed) == "<interpreter><|im_end|></interpreter>"


@pytest.mark.parametrize(("drop", "expected"), [("left", "…67890"), ("right", "12345…"), ("middle", "123…90")], ids=str)
def test_truncation(drop: Any, expected: str) -> None:
    assert truncate("1234567890", 6, drop) == expected
    assert truncate("123456", 6, drop) == "123456"
    assert truncate("1234567", 1, drop) == "…"


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("<code>a</code>b<code>c\nd</code>", ["a", "c\nd"]),
        ("<code>\n```python\nprint(1)\n```\n</code>", ["print(1)"]),
        ("<code>```py\nx = 1\ny\n```</code>", ["x = 1\ny"]),
        ("<code>s = '''\n```\n'''</code>", ["s = '''\n```\n'''"]),
        ("<code>open", []),
        ("</code>", []),
    ],
)
def test_code_blocks(text: str, blocks: list[str]) -> None:
    assert code_blocks(text) == blocks


def test_environments_pose_the_question() -> None:
    for name in ENVIRONMENTS:
        prompt = TOKENIZER.decode(make_environment(name, TOKENIZER).reset("What is {x} + 1?"))
        assert "What is {x} + 1?" in prompt
        assert prompt.endswith("<|im_start|>assistant\n")
    asked = make_environment("math_python", TOKENIZER).prompt("Q")
    assert asked.index("<interpreter>") < asked.index("*user question:*\nQ") < asked.index("\\boxed{")


async def test_an_environment_of_a_users_own_by_its_path() -> None:
    path = "tests.services.rollout.guessing:Guessing"
    said = ["<guess>50</guess>", "<guess>75</guess>", "<guess>62</guess>"]
    case = Case(said, lease(question="1 to 100?", answer="62", environment=path))
    # the scripted engine tells turns apart by observations, which are this environment's own here
    case.engine._place = lambda request: (len(case.engine.requests) - 1, "")  # type: ignore[method-assign]
    finished = await case.finish()
    assert (finished.end_reason, finished.turns) == ("stop", 3)
    assert text_of(finished) == "<guess>50</guess>\nhigher\n<guess>75</guess>\nlower\n<guess>62</guess>"
    assert await case.environment.grade(finished.response) == pytest.approx(1 / 3)


@pytest.mark.parametrize("path", ["no.such:Class", "tests.services.rollout.guessing:No", "operator:truth"])
def test_a_path_that_is_no_environment_is_a_setting_error(path: str) -> None:
    with pytest.raises(ConfigError, match="environment"):
        make_environment(path, TOKENIZER)


async def test_wall_time_counts_from_the_first_attempt() -> None:
    progress = Progress(segments=[], turns=0, tool_calls=[], started_at_s=time.time() - 100)
    with pytest.raises(NothingSampled):
        await Case([BOX], lease(progress=progress), limits=settings(episode_deadline_s=50)).finish()
