"""Typed clients of the value store: the blocking one, and by its name the asynchronous one beside it.

>>> with ValueStore("http://127.0.0.1:8100") as store:                         # doctest: +SKIP
...     ids = store.upsert([NewPrompt(question="47*91=?", answer="4277", source="multiply")])
...     store.get(ids[0]).v_hat
0.5
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from singlestream.clients.value_store_async import AsyncValueStore
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

__all__ = [
    "AsyncValueStore",
    "HistoryEntry",
    "Imported",
    "Job",
    "JobResult",
    "Ledger",
    "NewPrompt",
    "Page",
    "Policy",
    "PromptFilters",
    "PromptValue",
    "ShownTrajectory",
    "Split",
    "Stats",
    "Training",
    "Value",
    "ValueStore",
]

T = TypeVar("T", bound=BaseModel)


class ValueStore:
    """Blocking client. Every method raises `ServiceError` with the store's own words where it refuses or is away.

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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=token_header(token), timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(self, request: Request, kind: type[T]) -> T:
        try:
            return read_reply(request, self._http.request(request.method, request.path, **request.options()), kind)
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error

    def upsert(self, prompts: Sequence[NewPrompt]) -> Sequence[str]:
        """Insert or update prompts; returns their ids in order. May be repeated."""
        return [one for request in upsert_requests(prompts) for one in self._send(request, Ids).ids]

    def list(self, **filters: Unpack[PromptFilters]) -> Page:
        """One page. A text search may give a short one, even an empty one, with a cursor: go on from it."""
        return self._send(list_request(filters), Page)

    def iterate(self, **filters: Unpack[PromptFilters]) -> Iterator[PromptValue]:
        """All pages, prompt by prompt."""
        while True:
            page = self.list(**filters)
            yield from page.prompts
            if page.cursor is None:
                return
            filters["cursor"] = page.cursor

    def get(self, prompt_id: str) -> PromptValue:
        """One prompt and its posterior."""
        return self._send(Request("GET", f"/v1/prompts/{prompt_id}"), PromptValue)

    def history(self, prompt_id: str, limit: int = 256) -> Sequence[HistoryEntry]:
        """Updates of one prompt, newest first."""
        return self._send(Request("GET", f"/v1/prompts/{prompt_id}/history", params={"limit": limit}), History).entries

    def trajectories(self, prompt_id: str, limit: int = 4) -> Sequence[ShownTrajectory]:
        """The prompt's last trajectories that the store still holds, newest first."""
        request = Request("GET", f"/v1/prompts/{prompt_id}/trajectories", params={"limit": limit})
        return self._send(request, Trajectories).trajectories

    def values(
        self, ids: Sequence[str] | None = None, texts: Sequence[str] | None = None, source: str | None = None
    ) -> Sequence[Value | None]:
        """Values by ids, or by exact texts; None where a prompt is not known."""
        return [value for r in value_requests(ids, texts, source) for value in self._send(r, Values).values]

    def preview(self, count: int = 32) -> Sequence[Value]:
        """A draw that leases nothing."""
        return self._send(Request("GET", "/v1/preview", params={"count": count}), Preview).prompts

    def stats(self) -> Stats:
        """The table at a glance."""
        return self._send(Request("GET", "/v1/stats"), Stats)

    def ledger(self) -> Ledger:
        """Where every lease is."""
        return self._send(Request("GET", "/v1/ledger"), Ledger)

    def policy(self) -> Policy:
        """Policy versions and the clock."""
        return self._send(Request("GET", "/v1/policy"), Policy)

    def training(self) -> Training:
        """What training does."""
        return self._send(Request("GET", "/v1/training"), Training)

    def set_training(self, state: Literal["running", "paused", "stopped"]) -> Training:
        """Run, pause or stop training; stopped is final."""
        return self._send(Request("PUT", "/v1/training", {"state": state}), Training)

    def create_job(
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
        """Collect ``n`` rewards for each prompt of a split, or of a list.

        Each call makes a job, unless ``resume`` asks for the newest one that wants the same and has not failed.
        """
        return self._send(job_request(purpose, split, prompt_ids, n, limit, sampling, pinned, resume), Job)

    def jobs(self) -> Sequence[Job]:
        """All jobs, newest first."""
        jobs: list[Job] = []
        cursor = None
        while True:
            page = self._send(jobs_request(cursor), Jobs)
            jobs += page.jobs
            if (cursor := page.cursor) is None:
                return jobs

    def job(self, job_id: str) -> Job:
        """One job."""
        return self._send(Request("GET", f"/v1/jobs/{job_id}"), Job)

    def cancel_job(self, job_id: str) -> Job:
        """End a job early; its results so far stay."""
        return self._send(Request("POST", f"/v1/jobs/{job_id}/cancel"), Job)

    def job_results(self, job_id: str) -> Iterator[JobResult]:
        """Results of a job, streamed."""
        request = Request("GET", f"/v1/jobs/{job_id}/results")
        try:
            with self._http.stream(request.method, request.path) as reply:
                if not reply.is_success:
                    reply.read()
                    check_reply(request, reply)
                for line in reply.iter_lines():
                    yield JobResult.model_validate(json.loads(line))
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error

    def import_file(self, path: Path, source: str | None = None) -> Imported:
        """Import prompts and priors from .ndjson, .jsonl, .parquet, or the recipe's .json. May be repeated."""
        request = import_request(format_of(path), source)
        try:
            with path.open("rb") as file:
                reply = self._http.request(
                    request.method, request.path, content=file, timeout=IMPORT_TIMEOUT, **request.options()
                )
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error
        return read_reply(request, reply, Imported)

    def export_file(self, path: Path, job: str | None = None) -> None:
        """Write every prompt and its value to .ndjson or .parquet, or an estimation's rewards to the recipe's .json.

        The file is there once all of it is.
        """
        request = export_request(format_of(path), job)
        try:
            with self._http.stream(request.method, request.path, **request.options()) as reply:
                if not reply.is_success:
                    reply.read()
                    check_reply(request, reply)
                with beside(path) as file:
                    for chunk in reply.iter_bytes():
                        file.write(chunk)
        except httpx.HTTPError as error:
            raise lost_reply(request, error) from error

    def ready(self) -> bool:
        """Whether the store can write; False also where it is away."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.HTTPError:
            return False
