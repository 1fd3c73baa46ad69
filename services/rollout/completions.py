"""The OpenAI-compatible endpoints: completions and chat completions on the replica's engine, with streaming."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from services.rollout.answer_text import AnswerText
from services.rollout.generation import EngineDead, RequestRefused

if TYPE_CHECKING:
    from services.rollout.replica import Replica


StopString = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """What a streamed answer tells beside its text."""

    include_usage: bool = False
    """Whether the tokens' numbers come at its end."""


class _Request(BaseModel):
    # clients send many optional fields; all that are not here are looked at by `_refuse_unsupported`
    model_config = ConfigDict(extra="allow")

    model: str = ""
    """Ignored: there is one model, the policy."""
    max_tokens: int | None = Field(default=None, ge=1)
    """None: what the context leaves."""
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=128)
    """Answers to one prompt."""
    stop: StopString | list[StopString] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(_Request):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[int] | list[str]
    """Text, or token ids; a list of one text is a text."""
    logprobs: int | None = Field(default=None, ge=0, le=0)
    """0 asks for the sampled tokens' log-probabilities."""


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Another name of ``max_tokens``."""
    logprobs: bool | None = None
    """Whether the sampled tokens' log-probabilities are told."""


IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields of OpenAI's interface that do not change what is sampled."""
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "min_p": 0,
    "min_tokens": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "response_format": {"type": "text"},
    "stop_token_ids": [],
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}
"""Field that is not supported → the value that asks for nothing, as None does for every field."""


def _refuse_unsupported(request: _Request) -> None:
    """Refuse by name what would change the answer and is not done here, so whatever is not known."""
    told = {name: value for name, value in (request.model_extra or {}).items() if name not in IGNORED}
    asked = [name for name, value in told.items() if value is not None and value != NEUTRAL.get(name)]
    if isinstance(request, ChatRequest):  # an answer that is sent back has empty ones: refusal, annotations
        extras = [extra for message in request.messages for extra in (message.model_extra or {}).items()]
        asked += sorted({f"messages.{name}" for name, value in extras if value})
    if asked:
        raise HTTPException(422, f"not supported here: {', '.join(asked)}")


def router(replica_of: Callable[[], Replica]) -> APIRouter:
    """The endpoints, for `api.create_app`."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The one model: the run's policy, with the version that is loaded."""
        replica = replica_of()
        name = replica.config.run.name
        version, lineage = replica.weights.held
        card = {"id": name, "object": "model", "created": 0, "owned_by": "singlestream"}
        return {"object": "list", "data": [{**card, "version": version, "lineage": lineage}]}

    @routes.post("/completions")
    async def completions(request: CompletionRequest) -> Any:
        """Continue a text."""
        _refuse_unsupported(request)
        replica = replica_of()
        prompt = request.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise HTTPException(422, "one prompt a request")
            prompt = prompt[0]
        ids = replica.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        return await _answer(_Answer(replica, request, ids, "text_completion", request.logprobs is not None))

    @routes.post("/chat/completions")
    async def chat(request: ChatRequest) -> Any:
        """Answer a conversation, by the model's chat template."""
        _refuse_unsupported(request)
        replica = replica_of()
        if request.max_completion_tokens is not None:
            request = request.model_copy(update={"max_tokens": request.max_completion_tokens})
        text = _conversation(replica.tokenizer, request.messages)
        ids = replica.tokenizer.encode(text, add_special_tokens=False)
        return await _answer(_Answer(replica, request, ids, "chat.completion", bool(request.logprobs)))

    return routes


def _conversation(tokenizer: Any, messages: list[Message]) -> str:
    """The messages as the model's chat template writes them."""
    from jinja2 import TemplateError  # which transformers uses; imported here, as that is

    told = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True))
    except (ValueError, TemplateError) as error:  # there is none, or it refuses these roles
        raise HTTPException(422, f"the model's chat template: {error}") from error


async def _answer(answer: _Answer) -> Any:
    try:
        if not answer.request.stream:
            return JSONResponse(await answer.whole())
        if answer.request.n > 1:
            raise HTTPException(422, "a streamed request has one answer")
        events = answer.stream()
        first = await anext(events)  # what is wrong with the request is known by then, and is no 200
        return StreamingResponse(_after(first, events), media_type="text/event-stream")
    except RequestRefused as error:
        raise HTTPException(422, str(error)) from error
    except EngineDead as error:
        raise HTTPException(503, str(error)) from error


async def _after(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """All events, the last of them an error if the engine dies on the way: the client has its 200 already."""
    yield first
    try:
        async for event in events:
            yield event
    except EngineDead as error:
        yield _event({"error": {"message": str(error), "type": "server_error", "code": 503}})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


class _Answer:
    """One request on its way to a response."""

    def __init__(self, replica: Replica, request: _Request, ids: list[int], kind: str, logprobs: bool) -> None:
        self.replica, self.request, self.ids, self.kind, self.logprobs = replica, request, ids, kind, logprobs
        if not ids:
            raise HTTPException(422, "the prompt is empty")
        room = replica.config.rollout.max_model_tokens - len(ids)
        if room < 1:
            raise HTTPException(422, f"the prompt has {len(ids)} tokens, the context {len(ids) + room}")
        self.max_tokens = min(room, request.max_tokens or room)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @property
    def chat(self) -> bool:
        return self.kind == "chat.completion"

    async def whole(self) -> dict[str, Any]:
        """All answers at once."""
        samples = await asyncio.gather(*(self._sample(number) for number in range(self.request.n)))
        usage = self._usage(sum(len(tokens) for _, tokens in samples))
        return {**self._head(self.kind), "choices": [choice for choice, _ in samples], "usage": usage}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": len(self.ids),
            "completion_tokens": completion_tokens,
            "total_tokens": len(self.ids) + completion_tokens,
        }

    async def _sample(self, number: int) -> tuple[dict[str, Any], list[int]]:
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = "stop"
        async for part in self._parts(f"{self.id}-{number}"):
            tokens += part.token_ids
            logprobs += part.logprobs
            finish = part.finish or finish
        text = self._growing_text().add(tokens, last=True)
        choice: dict[str, Any] = {"index": number, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        if self.logprobs:
            choice["logprobs"] = self._told_logprobs(tokens, logprobs)
        return choice, tokens

    def _told_logprobs(self, tokens: list[int], logprobs: list[float]) -> dict[str, Any]:
        texts = [str(self.replica.tokenizer.decode([token])) for token in tokens]
        if self.chat:
            content = [{"token": t, "logprob": p, "top_logprobs": []} for t, p in zip(texts, logprobs, strict=True)]
            return {"content": content}
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": []}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: the text as it grows, then the reason of its end, then ``[DONE]``."""
        kind = "chat.completion.chunk" if self.chat else self.kind
        text, completion_tokens = self._growing_text(), 0
        async for part in self._parts(self.id):
            completion_tokens += len(part.token_ids)
            new = text.add(part.token_ids, last=part.finish is not None)
            choice: dict[str, Any] = {"index": 0, "finish_reason": part.finish}
            choice |= {"delta": {"role": "assistant", "content": new}} if self.chat else {"text": new}
            if self.logprobs:
                choice["logprobs"] = self._told_logprobs(part.token_ids, part.logprobs)
            yield _event({**self._head(kind), "choices": [choice]})
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            yield _event({**self._head(kind), "choices": [], "usage": self._usage(completion_tokens)})
        yield "data: [DONE]\n\n"

    def _parts(self, request_id: str) -> AsyncIterator[Any]:
        request = self.request
        return self.replica.engine.stream(
            request_id,
            self.ids,
            max_tokens=self.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=request.stops,
        )

    def _growing_text(self) -> AnswerText:
        decode = partial(self.replica.tokenizer.decode, skip_special_tokens=True)
        return AnswerText(lambda tokens: str(decode(tokens)), self.request.stops)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.replica.config.run.name}
