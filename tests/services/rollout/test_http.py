"""A replica's HTTP interface where something is wrong: each fault has its status, and is told apart from the others."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.rollout.api import create_app
from services.rollout.environments import Environment
from services.rollout.generation import EngineDead, Part, RequestRefused
from services.rollout.graders import Response
from services.rollout.replica import Replica
from singlestream.config import Config, RolloutConfig, RunConfig
from tests.services.rollout.policies import character_tokenizer, random_policy, save_policy
from tests.services.rollout.scripted import ScriptedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = {"messages": [{"role": "user", "content": "3+4=?"}]}
TEXT = "it is 7</x> and more"


class Engine(ScriptedEngine):
    """Streams `TEXT` token by token; ``fails`` after so many, with ``error``."""

    fails: int | None = None
    error: Exception = EngineDead("the engine died")

    async def stream(self, request_id: str, prompt_ids: list[int], **_: Any) -> AsyncIterator[Part]:
        tokens = self.tokenizer.encode(TEXT)
        for number, token in enumerate(tokens):
            if number == self.fails:
                raise self.error
            await asyncio.sleep(0)
            yield Part([token], [-0.5], "stop" if number == len(tokens) - 1 else None)

    def close(self) -> None:
        pass


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replica]:
    folder = tmp_path_factory.mktemp("replica")
    run = RunConfig(name="http", model=save_policy(random_policy(1), folder / "model"), total_steps=1)
    replica = Replica(Config(run=run, rollout=RolloutConfig(max_model_tokens=512, max_response_tokens=256)))
    yield replica
    await replica.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(one: Replica) -> Engine:
    """A fresh one of the replica's."""
    one.engine = Engine(character_tokenizer(), ["so \\boxed{7}"])  # type: ignore[assignment]
    return one.engine  # type: ignore[return-value]


@pytest_asyncio.fixture(loop_scope="module")
async def client(one: Replica, engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(lambda: one))
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        yield client


async def events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    reply = await client.post(path, json=body | {"stream": True})
    assert reply.status_code == 200, reply.text
    told = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in told]


@pytest.mark.parametrize(
    "extra",
    [
        {"seed": 0},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"min_p": 0.1},
        {"repetition_penalty": 0},
        {"min_tokens": 5},
        {"stop_token_ids": [3]},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"no_such_option": True},
    ],
    ids=lambda extra: next(iter(extra)),
)
async def test_what_is_not_supported_is_refused_by_name(client: httpx.AsyncClient, extra: dict[str, Any]) -> None:
    for path, body in (("/v1/completions", {"prompt": "3+4=?"}), ("/v1/chat/completions", CHAT)):
        reply = await client.post(path, json=body | extra)
        assert reply.status_code == 422
        assert reply.json()["detail"] == f"not supported here: {next(iter(extra))}"


async def test_what_asks_for_nothing_is_allowed(client: httpx.AsyncClient) -> None:
    nothing = {"seed": None, "presence_penalty": 0.0, "best_of": 1, "logit_bias": {}, "user": "me", "tools": None}
    answered = {"role": "assistant", "content": "7", "refusal": None, "annotations": []}
    body = {**nothing, "messages": [*CHAT["messages"], answered, {"role": "user", "content": "sure?"}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    answered["tool_calls"] = [{"id": "1"}]  # type: ignore[list-item]
    reply = await client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["detail"]) == (422, "not supported here: messages.tool_calls")


async def test_a_streamed_answer_ends_before_its_stop_string_as_the_whole_one_does(client: httpx.AsyncClient) -> None:
    body = {"prompt": "3+4=?", "stop": ["</x>", "never"], "stream_options": {"include_usage": True}, "logprobs": 0}
    whole = (await client.post("/v1/completions", json=body)).json()
    told = await events(client, "/v1/completions", body)
    assert told[-1] == "[DONE]"
    assert told[-2]["usage"] == whole["usage"]
    parts = [one["choices"][0]["text"] for one in told[:-2]]
    assert "".join(parts) == whole["choices"][0]["text"] == "it is 7"
    assert len([part for part in parts if part]) > 1
    logprobs = [number for one in told[:-2] for number in one["choices"][0]["logprobs"]["token_logprobs"]]
    assert logprobs == whole["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(EngineDead("it died"), 503), (RequestRefused("no such token"), 422)], ids=["dead", "refused"]
)
async def test_a_request_that_fails_at_once_is_no_200(
    client: httpx.AsyncClient, engine: Engine, stream: bool, error: Exception, status: int
) -> None:
    engine.fails, engine.error = 0, error
    reply = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert (reply.status_code, reply.json()["detail"]) == (status, str(error))


async def test_an_engine_that_dies_in_the_middle_of_a_stream_is_told_in_it(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    engine.fails = 3
    *parts, last = await events(client, "/v1/chat/completions", CHAT)
    assert len(parts) == 3
    assert last["error"]["message"] == "the engine died"


@pytest.mark.parametrize(
    ("template", "says"),
    [(None, "chat_template"), ("{{ raise_exception('roles must alternate') }}", "roles must alternate")],
    ids=["none", "refuses"],
)
async def test_a_conversation_that_the_model_has_no_template_for(
    client: httpx.AsyncClient, one: Replica, monkeypatch: pytest.MonkeyPatch, template: str | None, says: str
) -> None:
    monkeypatch.setattr(one.tokenizer, "chat_template", template)
    reply = await client.post("/v1/chat/completions", json=CHAT)
    assert reply.status_code == 422
    assert says in reply.json()["detail"]


@pytest.mark.parametrize("stop", ["", ["x", ""]])
async def test_an_empty_stop_string_is_refused(client: httpx.AsyncClient, stop: Any) -> None:
    assert (await client.post("/v1/completions", json={"prompt": "x", "stop": stop})).status_code == 422


async def test_the_last_replica_cannot_be_scaled_away(client: httpx.AsyncClient) -> None:
    reply = await client.put("/v1/scale", json={"replicas": 0})
    assert reply.status_code == 422
    assert "POST /v1/control pauses all" in reply.text


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
    return 1.0 if data_source == "sums" and ground_truth in solution_str else -1.0


def raising(_: Response) -> float:
    return {"a": 1.0}["b"]


def no_number(_: Response) -> float:
    return math.nan


def too_much(_: Response) -> float:
    return 2.0


class Broken(Environment):
    name = "broken"

    def prompt(self, question: str) -> str:
        return question[1000]


async def test_a_verl_function_is_told_the_prompts_source(client: httpx.AsyncClient) -> None:
    body = {"question": "3+4=?", "answer": "7", "environment": f"single_turn/verl:{__name__}:compute_score"}
    rewards = [
        (await client.post("/v1/episodes", json=body | extra)).json()["reward"] for extra in ({"source": "sums"}, {})
    ]
    assert rewards == [1.0, 0.0]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (f"single_turn/{__name__}:raising", "KeyError: 'b'"),
        (f"single_turn/{__name__}:no_number", "returned nan; a reward is finite and in [0, 1]"),
        (f"single_turn/{__name__}:too_much", "returned 2.0; a reward is finite and in [0, 1]"),
        (f"{__name__}:Broken", "IndexError"),
        ("no_such", "environment 'no_such': 'no_such'"),
    ],
    ids=["raises", "nan", "2.0", "environment", "unknown"],
)
async def test_a_task_of_ones_own_is_tried_out_with_its_traceback(
    client: httpx.AsyncClient, environment: str, says: str
) -> None:
    reply = await client.post("/v1/episodes", json={"question": "3+4=?", "answer": "7", "environment": environment})
    assert reply.status_code == 422, reply.text
    assert says in reply.json()["detail"]
    assert reply.json()["detail"].startswith("Traceback") == (environment != "no_such")


async def test_a_gateway_that_lives_but_runs_nothing_is_not_healthy(
    one: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = 503

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        status = {b"/healthz": 200, b"/readyz": ready}.get(path, 404)
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, httpx.AsyncClient(base_url=url, timeout=60) as probe:
        monkeypatch.setattr(one, "_probe", probe)
        assert not await one.tools_healthy()
        ready = 200
        assert await one.tools_healthy()
