"""Typed clients of the value store, blocking and asynchronous, over one description of its requests.

>>> with ValueStore("http://127.0.0.1:8100") as store:                         # doctest: +SKIP
...     ids = store.upsert([NewPrompt(question="47*91=?", answer="4277", source="multiply")])
...     store.get(ids[0]).v_hat
0.5
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from singlestream.contracts import Sampling
from singlestream.errors import ServiceError

Split = Literal["train", "eval"]
Order = Literal["id", "value", "weight", "visits", "n_eff", "updated"]
TrainingState = Literal["running", "paused", "stopping", "stopped", "finished"]

TIMEOUT_S = 60.0
PROMPTS_PER_REQUEST = 2000
"""Longer lists are sent in parts; the store's bound is its setting ``max_prompts_per_request``."""


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class NewPrompt(BaseModel):
    """A prompt to insert or replace.

    Args:
        question: the task's text, without any chat template; with ``source`` it makes the prompt's id.
        answer: ground truth for the grader.
        source: data set it came from.
        environment: name of the environment that runs and grades it.
        split: ``train`` prompts are drawn for training, ``eval`` prompts by jobs only.
        prior_rewards: offline rewards in [0, 1] for the prior of a prompt without visits; None leaves the prior.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    answer: str
    source: str = "default"
    environment: str = "math_python"
    split: Split = "train"
    prior_rewards: list[float] | None = None


class Value(_Reply):
    """A prompt's posterior: v̂ = α/(α+β) in (0, 1), n_eff in observations, 95 % interval, times in Unix seconds."""

    prompt_id: str
    alpha: float
    beta: float
    v_hat: float
    n_eff: float
    visits: int
    interval: tuple[float, float]
    version: int | None
    updated_at_s: float
    in_flight: bool
    source: str
    split: Split


class PromptValue(Value):
    """A prompt and its posterior."""

    question: str
    answer: str
    environment: str


class HistoryEntry(_Reply):
    """One update of a posterior; n_eff and ``v_hat_after`` after it, ``v_hat_at_lease`` as frozen at the lease."""

    lease_id: str
    outcome: Literal["trained", "stale"]
    version: int
    reward: float
    rho: float
    v_hat_before: float
    v_hat_after: float
    n_eff: float
    z: float
    v_hat_at_lease: float
    at_s: float


class Training(_Reply):
    """What training does; ``waiting_for`` is None while leases are issued."""

    state: TrainingState
    waiting_for: str | None
    trained: int
    total: int
    outstanding: int
    headroom: int


class Job(_Reply):
    """A job and its totals; means are None before the first reward."""

    job_id: str
    purpose: Literal["estimate", "evaluate"]
    state: Literal["running", "finished"]
    n: int
    prompts: int
    total: int
    done: int
    failed: int
    outstanding: int
    reward_mean: float | None
    tool_calls_mean: float | None
    response_tokens_mean: float | None
    versions: dict[int, int]
    sampling: Sampling
    created_at_s: float
    finished_at_s: float | None


class JobResult(_Reply):
    """One result of a job; ``reward`` is None where it failed for good."""

    prompt_id: str
    repetition: int
    lease_id: str
    reward: float | None
    version: int | None
    turns: int
    tool_calls: int
    action_tokens: int
    response_tokens: int
    end_reason: str
    failures: int


class PurposeLedger(_Reply):
    """Leases of one purpose."""

    leased: int
    outstanding: int
    trained: int
    stale: int
    failed: int
    scored: int
    cancelled: int
    adds_up: bool


class Ledger(_Reply):
    """All leases at one moment."""

    train: PurposeLedger
    estimate: PurposeLedger
    evaluate: PurposeLedger
    duplicates: int
    epoch: str


class Version(_Reply):
    """A published policy version and its place on the drift clock."""

    version: int
    lineage: int
    z: float
    drift: float
    published_at_s: float


class Policy(_Reply):
    """Policy versions, oldest first."""

    newest: Version | None
    z_now: float
    versions: list[Version]


class Bin(_Reply):
    """One bar of a histogram."""

    low: float
    high: float
    count: int


class ReliabilityBin(_Reply):
    """Leases whose frozen v̂ lies in one tenth, and their rewards."""

    v_hat_low: float
    v_hat_high: float
    count: int
    v_hat_mean: float
    reward_mean: float


class Replica(_Reply):
    """A rollout replica's last report."""

    name: str
    slots: int
    in_use: int
    version: int | None
    lineage: int | None
    at_s: float
    alive: bool


class Stats(_Reply):
    """The table at a glance."""

    prompts: int
    prompts_train: int
    visited: int
    visits: int
    v_hat_mean: float | None
    v_hat_histogram: list[Bin]
    n_eff_histogram: list[Bin]
    sampling_entropy_nats: float
    sampling_entropy_max_nats: float
    brier: float | None
    reliability: list[ReliabilityBin]
    replicas: list[Replica] = Field(default_factory=list)


class Page(_Reply):
    """One page of prompts; ``cursor`` gets the next one, None on the last."""

    prompts: list[PromptValue]
    cursor: str | None


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    json: Any = None
    params: dict[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.json is not None:
            options["json"] = self.json
        if self.params is not None:
            options["params"] = {name: value for name, value in self.params.items() if value is not None}
        return options


T = TypeVar("T")


def _read(request: _Request, reply: httpx.Response, kind: type[T] | TypeAdapter[T]) -> T:
    _check(request, reply)
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_json(reply.content)
    except ValidationError as error:
        detail = f"the reply is not what this client knows: {error}"
        raise ServiceError("value_store", f"{request.method} {reply.url}", detail, reply.status_code) from error


def _check(request: _Request, reply: httpx.Response) -> None:
    if reply.is_success:
        return
    try:
        detail = str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = reply.text[:2000]
    status = f"{reply.status_code} {detail}"
    raise ServiceError("value_store", f"{request.method} {reply.url}", status, reply.status_code)


def _lost(request: _Request, error: httpx.HTTPError) -> ServiceError:
    return ServiceError("value_store", f"{request.method} {request.path}", f"{type(error).__name__}: {error}")


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _upserts(prompts: Sequence[NewPrompt]) -> Iterator[_Request]:
    for prompt in prompts:
        for reward in prompt.prior_rewards or ():
            if not math.isfinite(reward) or not 0.0 <= reward <= 1.0:
                raise ValueError(f"prior_rewards of {prompt.question[:80]!r}: {reward} is not in [0, 1]")
    for start in range(0, len(prompts), PROMPTS_PER_REQUEST):
        part = prompts[start : start + PROMPTS_PER_REQUEST]
        yield _Request("POST", "/v1/prompts", [prompt.model_dump() for prompt in part])


def _values(ids: Sequence[str] | None, texts: Sequence[str] | None, source: str | None) -> Iterator[_Request]:
    if (ids is None) == (texts is None):
        raise ValueError("give either ids or texts")
    name, items = ("ids", ids) if ids is not None else ("texts", texts)
    for start in range(0, len(items or ()), PROMPTS_PER_REQUEST):
        part = list((items or ())[start : start + PROMPTS_PER_REQUEST])
        yield _Request("POST", "/v1/values", {name: part, "source": source})


def _list(filters: dict[str, Any]) -> _Request:
    return _Request("GET", "/v1/prompts", params=filters)


def _job(
    purpose: str,
    split: Split | None,
    prompt_ids: Sequence[str] | None,
    n: int,
    limit: int | None,
    sampling: Sampling | None,
) -> _Request:
    body = {
        "purpose": purpose,
        "split": split,
        "prompt_ids": list(prompt_ids) if prompt_ids is not None else None,
        "n": n,
        "limit": limit,
        "sampling": sampling.model_dump() if sampling else None,
    }
    return _Request("POST", "/v1/jobs", body)


class _Ids(_Reply):
    ids: list[str]


class _Values(_Reply):
    values: list[Value | None]


class _Preview(_Reply):
    prompts: list[Value]


class _History(_Reply):
    entries: list[HistoryEntry]


_JOBS = TypeAdapter(list[Job])


class ValueStore:
    """Blocking client. Every method raises `ServiceError` with the store's own words where it refuses or is away.

    Args:
        url: where the store listens.
        token: bearer token; None where none is asked for.
        timeout_s: of one request.
        transport: for tests; None uses the network.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(token), timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(self, request: _Request, kind: type[T] | TypeAdapter[T]) -> T:
        try:
            return _read(request, self._http.request(request.method, request.path, **request.options()), kind)
        except httpx.HTTPError as error:
            raise _lost(request, error) from error

    def upsert(self, prompts: Sequence[NewPrompt]) -> Sequence[str]:
        """Insert or update prompts; returns their ids in order. May be repeated."""
        return [one for request in _upserts(prompts) for one in self._send(request, _Ids).ids]

    def list(self, **filters: Any) -> Page:
        """One page; filters as GET /v1/prompts names them.

        Source, split, q, v_hat_min, …, order, descending, limit, cursor.
        """
        return self._send(_list(filters), Page)

    def iterate(self, **filters: Any) -> Iterator[PromptValue]:
        """All pages, prompt by prompt."""
        cursor = filters.pop("cursor", None)
        while True:
            page = self.list(**filters, cursor=cursor)
            yield from page.prompts
            if (cursor := page.cursor) is None:
                return

    def get(self, prompt_id: str) -> PromptValue:
        """One prompt and its posterior."""
        return self._send(_Request("GET", f"/v1/prompts/{prompt_id}"), PromptValue)

    def history(self, prompt_id: str, limit: int = 256) -> Sequence[HistoryEntry]:
        """Updates of one prompt, newest first."""
        return self._send(
            _Request("GET", f"/v1/prompts/{prompt_id}/history", params={"limit": limit}), _History
        ).entries

    def values(
        self, ids: Sequence[str] | None = None, texts: Sequence[str] | None = None, source: str | None = None
    ) -> Sequence[Value | None]:
        """Values by ids, or by exact texts; None where a prompt is not known."""
        return [value for r in _values(ids, texts, source) for value in self._send(r, _Values).values]

    def preview(self, count: int = 32) -> Sequence[Value]:
        """A draw that leases nothing."""
        return self._send(_Request("GET", "/v1/preview", params={"count": count}), _Preview).prompts

    def stats(self) -> Stats:
        """The table at a glance."""
        return self._send(_Request("GET", "/v1/stats"), Stats)

    def ledger(self) -> Ledger:
        """Where every lease is."""
        return self._send(_Request("GET", "/v1/ledger"), Ledger)

    def policy(self) -> Policy:
        """Policy versions and the clock."""
        return self._send(_Request("GET", "/v1/policy"), Policy)

    def training(self) -> Training:
        """What training does."""
        return self._send(_Request("GET", "/v1/training"), Training)

    def set_training(self, state: Literal["running", "paused", "stopped"]) -> Training:
        """Run, pause or stop training; stopped is final."""
        return self._send(_Request("PUT", "/v1/training", {"state": state}), Training)

    def create_job(
        self,
        purpose: Literal["estimate", "evaluate"],
        split: Split | None = None,
        prompt_ids: Sequence[str] | None = None,
        n: int = 1,
        limit: int | None = None,
        sampling: Sampling | None = None,
    ) -> Job:
        """Collect ``n`` rewards for each prompt of a split, or of a list.

        Not to be repeated blindly: each call makes a job.
        """
        return self._send(_job(purpose, split, prompt_ids, n, limit, sampling), Job)

    def jobs(self) -> Sequence[Job]:
        """All jobs, newest first."""
        return self._send(_Request("GET", "/v1/jobs"), _JOBS)

    def job(self, job_id: str) -> Job:
        """One job."""
        return self._send(_Request("GET", f"/v1/jobs/{job_id}"), Job)

    def job_results(self, job_id: str) -> Iterator[JobResult]:
        """Results of a job, streamed."""
        request = _Request("GET", f"/v1/jobs/{job_id}/results")
        try:
            with self._http.stream(request.method, request.path) as reply:
                if not reply.is_success:
                    reply.read()
                    _check(request, reply)
                for line in reply.iter_lines():
                    yield JobResult.model_validate(json.loads(line))
        except httpx.HTTPError as error:
            raise _lost(request, error) from error

    def ready(self) -> bool:
        """Whether the store can write; False also where it is away."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.HTTPError:
            return False


class AsyncValueStore:
    """Asynchronous client: the methods of `ValueStore`, to be awaited.

    Args:
        url: where the store listens.
        token: bearer token; None where none is asked for.
        timeout_s: of one request.
        transport: for tests; None uses the network.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(token), timeout=timeout_s, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, request: _Request, kind: type[T] | TypeAdapter[T]) -> T:
        try:
            return _read(request, await self._http.request(request.method, request.path, **request.options()), kind)
        except httpx.HTTPError as error:
            raise _lost(request, error) from error

    async def upsert(self, prompts: Sequence[NewPrompt]) -> Sequence[str]:
        """Insert or update prompts; returns their ids in order. May be repeated."""
        return [one for request in _upserts(prompts) for one in (await self._send(request, _Ids)).ids]

    async def list(self, **filters: Any) -> Page:
        """One page; filters as GET /v1/prompts names them."""
        return await self._send(_list(filters), Page)

    async def iterate(self, **filters: Any) -> AsyncIterator[PromptValue]:
        """All pages, prompt by prompt."""
        cursor = filters.pop("cursor", None)
        while True:
            page = await self.list(**filters, cursor=cursor)
            for prompt in page.prompts:
                yield prompt
            if (cursor := page.cursor) is None:
                return

    async def get(self, prompt_id: str) -> PromptValue:
        """One prompt and its posterior."""
        return await self._send(_Request("GET", f"/v1/prompts/{prompt_id}"), PromptValue)

    async def history(self, prompt_id: str, limit: int = 256) -> Sequence[HistoryEntry]:
        """Updates of one prompt, newest first."""
        request = _Request("GET", f"/v1/prompts/{prompt_id}/history", params={"limit": limit})
        return (await self._send(request, _History)).entries

    async def values(
        self, ids: Sequence[str] | None = None, texts: Sequence[str] | None = None, source: str | None = None
    ) -> Sequence[Value | None]:
        """Values by ids, or by exact texts; None where a prompt is not known."""
        return [value for r in _values(ids, texts, source) for value in (await self._send(r, _Values)).values]

    async def preview(self, count: int = 32) -> Sequence[Value]:
        """A draw that leases nothing."""
        return (await self._send(_Request("GET", "/v1/preview", params={"count": count}), _Preview)).prompts

    async def stats(self) -> Stats:
        """The table at a glance."""
        return await self._send(_Request("GET", "/v1/stats"), Stats)

    async def ledger(self) -> Ledger:
        """Where every lease is."""
        return await self._send(_Request("GET", "/v1/ledger"), Ledger)

    async def policy(self) -> Policy:
        """Policy versions and the clock."""
        return await self._send(_Request("GET", "/v1/policy"), Policy)

    async def training(self) -> Training:
        """What training does."""
        return await self._send(_Request("GET", "/v1/training"), Training)

    async def set_training(self, state: Literal["running", "paused", "stopped"]) -> Training:
        """Run, pause or stop training; stopped is final."""
        return await self._send(_Request("PUT", "/v1/training", {"state": state}), Training)

    async def create_job(
        self,
        purpose: Literal["estimate", "evaluate"],
        split: Split | None = None,
        prompt_ids: Sequence[str] | None = None,
        n: int = 1,
        limit: int | None = None,
        sampling: Sampling | None = None,
    ) -> Job:
        """Collect ``n`` rewards for each prompt of a split, or of a list. Each call makes a job."""
        return await self._send(_job(purpose, split, prompt_ids, n, limit, sampling), Job)

    async def jobs(self) -> Sequence[Job]:
        """All jobs, newest first."""
        return await self._send(_Request("GET", "/v1/jobs"), _JOBS)

    async def job(self, job_id: str) -> Job:
        """One job."""
        return await self._send(_Request("GET", f"/v1/jobs/{job_id}"), Job)

    async def job_results(self, job_id: str) -> AsyncIterator[JobResult]:
        """Results of a job, streamed."""
        request = _Request("GET", f"/v1/jobs/{job_id}/results")
        try:
            async with self._http.stream(request.method, request.path) as reply:
                if not reply.is_success:
                    await reply.aread()
                    _check(request, reply)
                async for line in reply.aiter_lines():
                    yield JobResult.model_validate(json.loads(line))
        except httpx.HTTPError as error:
            raise _lost(request, error) from error

    async def ready(self) -> bool:
        """Whether the store can write; False also where it is away."""
        try:
            return (await self._http.get("/readyz")).is_success
        except httpx.HTTPError:
            return False
