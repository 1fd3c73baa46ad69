"""The asynchronous client of the value store; `singlestream.clients.value_store` is where to import it from."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal, Self, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from singlestream.clients.value_store_messages import (
    IMPORT_TIMEOUT,
    TIMEOUT_S,
    Imported,
    JobResult,
    NewPrompt,
    PromptFilters,
    Request,
    beside,
    check_reply,
    export_request,
    format_of,
    import_request,
    job_request,
    jobs_request,
    list_request,
    lost_reply,
    read_reply,
    token_header,
    upsert_requests,
    value_requests,
)
from singlestream.clients.value_store_replies import (
    History,
    HistoryEntry,
    Ids,
    Job,
    Jobs,
    Ledger,
    Page,
    Policy,
    Preview,
    PromptValue,
    ShownTrajectory,
    Split,
    Stats,
    Training,
    Trajectories,
    Value,
    Values,
)
from singlestream.contracts import Sampling

READ_BYTES = 1 << 20

T = TypeVar("T", bound=BaseModel)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


class AsyncValueStore:
    """Asynchronous client: the methods of `ValueStore`, to be awaited, with the same arguments.

    Args:
        url: where the store listens.
        token: bearer token; None where none is asked for.
        timeout_s: of one request; an import's answer is waited for an hour (`IMPORT_TIMEOUT`).
        transport: for tests; None uses the network.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, headers=token_header(token), timeout=timeout_s, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, request: Request, kind: type[T]) -> T:
        try:
            return read_reply(
                request, await self._http.request(request.method, request.path, **request.options()), kind
            )
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error

    async def upsert(self, prompts: Sequence[NewPrompt]) -> Sequence[str]:
        """Insert or update prompts; returns their ids in order. May be repeated."""
        return [one for request in upsert_requests(prompts) for one in (await self._send(request, Ids)).ids]

    async def list(self, **filters: Unpack[PromptFilters]) -> Page:
        """One page. A text search may give a short one, even an empty one, with a cursor: go on from it."""
        return await self._send(list_request(filters), Page)

    async def iterate(self, **filters: Unpack[PromptFilters]) -> AsyncIterator[PromptValue]:
        """All pages, prompt by prompt."""
        while True:
            page = await self.list(**filters)
            for prompt in page.prompts:
                yield prompt
            if page.cursor is None:
                return
            filters["cursor"] = page.cursor

    async def get(self, prompt_id: str) -> PromptValue:
        """One prompt and its posterior."""
        return await self._send(Request("GET", f"/v1/prompts/{prompt_id}"), PromptValue)

    async def history(self, prompt_id: str, limit: int = 256) -> Sequence[HistoryEntry]:
        """Updates of one prompt, newest first."""
        request = Request("GET", f"/v1/prompts/{prompt_id}/history", params={"limit": limit})
        return (await self._send(request, History)).entries

    async def trajectories(self, prompt_id: str, limit: int = 4) -> Sequence[ShownTrajectory]:
        """The prompt's last trajectories that the store still holds, newest first."""
        request = Request("GET", f"/v1/prompts/{prompt_id}/trajectories", params={"limit": limit})
        return (await self._send(request, Trajectories)).trajectories

    async def values(
        self, ids: Sequence[str] | None = None, texts: Sequence[str] | None = None, source: str | None = None
    ) -> Sequence[Value | None]:
        """Values by ids, or by exact texts; None where a prompt is not known."""
        return [value for r in value_requests(ids, texts, source) for value in (await self._send(r, Values)).values]

    async def preview(self, count: int = 32) -> Sequence[Value]:
        """A draw that leases nothing."""
        return (await self._send(Request("GET", "/v1/preview", params={"count": count}), Preview)).prompts

    async def stats(self) -> Stats:
        """The table at a glance."""
        return await self._send(Request("GET", "/v1/stats"), Stats)

    async def ledger(self) -> Ledger:
        """Where every lease is."""
        return await self._send(Request("GET", "/v1/ledger"), Ledger)

    async def policy(self) -> Policy:
        """Policy versions and the clock."""
        return await self._send(Request("GET", "/v1/policy"), Policy)

    async def training(self) -> Training:
        """What training does."""
        return await self._send(Request("GET", "/v1/training"), Training)

    async def set_training(self, state: Literal["running", "paused", "stopped"]) -> Training:
        """Run, pause or stop training; stopped is final."""
        return await self._send(Request("PUT", "/v1/training", {"state": state}), Training)

    async def create_job(
        self,
        purpose: Literal["estimate", "evaluate"],
        split: Split | None = None,
        prompt_ids: Sequence[str] | None = None,
        n: int = 1,
        limit: int | None = None,
        sampling: Sampling | None = None,
        pinned: bool = False,
        resume: bool = False,
    ) -> Job:
        """Collect ``n`` rewards for each prompt of a split, or of a list; see `ValueStore.create_job`."""
        return await self._send(job_request(purpose, split, prompt_ids, n, limit, sampling, pinned, resume), Job)

    async def jobs(self) -> Sequence[Job]:
        """All jobs, newest first."""
        jobs: list[Job] = []
        cursor = None
        while True:
            page = await self._send(jobs_request(cursor), Jobs)
            jobs += page.jobs
            if (cursor := page.cursor) is None:
                return jobs

    async def job(self, job_id: str) -> Job:
        """One job."""
        return await self._send(Request("GET", f"/v1/jobs/{job_id}"), Job)

    async def cancel_job(self, job_id: str) -> Job:
        """End a job early; its results so far stay."""
        return await self._send(Request("POST", f"/v1/jobs/{job_id}/cancel"), Job)

    async def job_results(self, job_id: str) -> AsyncIterator[JobResult]:
        """Results of a job, streamed."""
        request = Request("GET", f"/v1/jobs/{job_id}/results")
        try:
            async with self._http.stream(request.method, request.path) as reply:
                if not reply.is_success:
                    await reply.aread()
                    check_reply(request, reply)
                async for line in reply.aiter_lines():
                    yield JobResult.model_validate(json.loads(line))
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error

    async def import_file(self, path: Path, source: str | None = None) -> Imported:
        """Import prompts and priors from .ndjson, .jsonl, .parquet, or the recipe's .json. May be repeated."""
        request = import_request(format_of(path), source)
        try:
            body = _chunks(path)
            reply = await self._http.request(
                request.method, request.path, content=body, timeout=IMPORT_TIMEOUT, **request.options()
            )
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error
        return read_reply(request, reply, Imported)

    async def export_file(self, path: Path, job: str | None = None) -> None:
        """Write every prompt and its value to a file; see `ValueStore.export_file`."""
        request = export_request(format_of(path), job)
        try:
            async with self._http.stream(request.method, request.path, **request.options()) as reply:
                if not reply.is_success:
                    await reply.aread()
                    check_reply(request, reply)
                with beside(path) as file:
                    async for chunk in reply.aiter_bytes():
                        file.write(chunk)
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error

    async def ready(self) -> bool:
        """Whether the store can write; False also where it is away."""
        try:
            return (await self._http.get("/readyz")).is_success
        except httpx.HTTPError:
            return False
