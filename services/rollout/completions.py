"""The OpenAI-compatible endpoints: completions and chat completions on the replica's engine, with streaming."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from services.rollout.generation import EngineDead

if TYPE_CHECKING:
    from services.rollout.replica import Replica


class _Request(BaseModel):
    # clients send many optional fields; those that would change the answer and are not here are refused by name
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
    stop: str | list[str] | None = None
    stream: bool = False

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

    role: str
    content: str


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Another name of ``max_tokens``."""


UNSUPPORTED = ("tools", "functions", "response_format", "logit_bias", "best_of", "suffix", "echo", "top_logprobs")


def _refuse_unsupported(request: _Request) -> None:
    asked = [name for name in UNSUPPORTED if (request.model_extra or {}).get(name)]
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
        text = replica.tokenizer.apply_chat_template(
            [message.model_dump() for message in request.messages], tokenize=False, add_generation_prompt=True
        )
        ids = replica.tokenizer.encode(text, add_special_tokens=False)
        wants_logprobs = bool((request.model_extra or {}).get("logprobs"))
        return await _answer(_Answer(replica, request, ids, "chat.completion", wants_logprobs))

    return routes


async def _answer(answer: _Answer) -> Any:
    try:
        if answer.request.stream:
            if answer.request.n > 1:
                raise HTTPException(422, "a streamed request has one answer")
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return JSONResponse(await answer.whole())
    except EngineDead as error:
        raise HTTPException(503, str(error)) from error


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
        completion_tokens = sum(len(tokens) for _, tokens in samples)
        usage = {
            "prompt_tokens": len(self.ids),
            "completion_tokens": completion_tokens,
            "total_tokens": len(self.ids) + completion_tokens,
        }
        return {**self._head(self.kind), "choices": [choice for choice, _ in samples], "usage": usage}

    async def _sample(self, number: int) -> tuple[dict[str, Any], list[int]]:
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = "stop"
        async for part in self._parts(f"{self.id}-{number}"):
            tokens += part.token_ids
            logprobs += part.logprobs
            finish = part.finish or finish
        text = self._text(tokens)
        choice: dict[str, Any] = {"index": number, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        if self.logprobs:
            choice["logprobs"] = self._told_logprobs(tokens, logprobs)
        return choice, tokens

    def _told_logprobs(self, tokens: list[int], logprobs: list[float]) -> dict[str, Any]:
        texts = [self._text([token], special=True) for token in tokens]
        if self.chat:
            content = [{"token": t, "logprob": p, "top_logprobs": []} for t, p in zip(texts, logprobs, strict=True)]
            return {"content": content}
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": []}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: the text as it grows, then the reason of its end, then ``[DONE]``."""
        kind = "chat.completion.chunk" if self.chat else self.kind
        tokens: list[int] = []
        sent = 0
        async for part in self._parts(self.id):
            tokens += part.token_ids
            text = self._text(tokens)
            # a character cut by the token boundary comes with its next token
            new = "" if text.endswith("\ufffd") and part.finish is None else text[sent:]
            sent += len(new)
            choice: dict[str, Any] = {"index": 0, "finish_reason": part.finish}
            choice |= {"delta": {"role": "assistant", "content": new}} if self.chat else {"text": new}
            yield f"data: {json.dumps({**self._head(kind), 'choices': [choice]})}\n\n"
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

    def _text(self, tokens: list[int], special: bool = False) -> str:
        text = str(self.replica.tokenizer.decode(tokens, skip_special_tokens=not special))
        if not special:
            for stop in self.request.stops:
                text = text.split(stop, 1)[0]
        return text

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.replica.config.run.name}
