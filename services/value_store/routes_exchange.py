"""REST: import and export, streamed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Literal

import msgpack
import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException

from services.value_store import exchange, views
from services.value_store.examples import JOB_ID, NEW_PROMPT, PROMPT_VALUE
from services.value_store.exchange import ROWS_AT_A_TIME, BadImport
from services.value_store.jobs import Job
from services.value_store.problems import problem_docs
from services.value_store.prompts import Prompt, prior_of
from services.value_store.routes_prompts import StoreDep
from services.value_store.schemas import Imported, ImportedPrompt
from services.value_store.store import Store
from singlestream.clients.value_store_replies import PromptValue
from singlestream.streams.ledger import prompt_id

reads = APIRouter(prefix="/v1", tags=["exchange"])
writes = APIRouter(prefix="/v1", tags=["exchange"])

MEDIA = {
    "ndjson": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
    "offline_values": "application/json",
}
Format = Literal["ndjson", "parquet", "offline_values"]
ANY_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"format": "binary"}, "example": json.dumps(NEW_PROMPT) + "\n"}
        },
    }
}
FILES = {
    MEDIA["ndjson"]: {"example": json.dumps(PROMPT_VALUE) + "\n"},
    MEDIA["parquet"]: {"schema": {"type": "string", "format": "binary"}},
    MEDIA["offline_values"]: {"example": {NEW_PROMPT["question"]: NEW_PROMPT["prior_rewards"]}},
}


@writes.post("/import", summary="Import prompts and priors", openapi_extra=ANY_BODY, responses=problem_docs(409))
async def import_prompts(
    store: StoreDep,
    request: Request,
    format: Annotated[Format, Query(description="What the body is.")] = "ndjson",
    source: Annotated[
        str | None,
        Query(
            max_length=200,
            description="offline_values: source of the texts; null tries every known one.",
            examples=["multiply"],
        ),
    ] = None,
) -> Imported:
    """The body is streamed: any number of prompts, some tens of megabytes of memory. It may be repeated safely.

    ndjson and parquet: columns question, answer, source, environment, split, and a prior as prior_rewards or as alpha
    and beta; prompts with visits keep their value. offline_values: ``{prompt text: [scores]}`` of the reference
    recipe sets the priors of known prompts. What stands before a bad line or row has been imported; the error names
    its number. Parquet is read from its end: that body stands in the folder for temporary files (TMPDIR) meanwhile.
    """
    body = _bounded(request.stream(), store.config.value_store.max_import_bytes)
    counts = Imported(prompts=0, priors=0, unknown=0)
    try:
        if format == "offline_values":
            async for pairs in exchange.read_offline_values(body):
                await _take_offline(store, pairs, source, counts)
        elif format == "ndjson":
            async for prompts in exchange.read_ndjson(body):
                await _take(store, prompts, counts)
        else:
            async with _kept(body) as path:
                async for prompts in iterate_in_threadpool(exchange.read_parquet(path)):
                    await _take(store, prompts, counts)
    except BadImport as error:
        raise HTTPException(422, f"{error}; {counts.prompts} prompts before it have been imported") from error
    return counts


@asynccontextmanager
async def _kept(body: AsyncIterator[bytes]) -> AsyncIterator[Path]:
    """The body as a file, for as long as it is read."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="singlestream-import-"))
            path = Path(folder) / "body"
            with path.open("wb") as file:
                async for chunk in body:
                    await run_in_threadpool(_append, file, chunk)
        except OSError as error:
            where = tempfile.tempdir or "a folder for temporary files"
            what = f"the import cannot be kept in {where} while it is read ({error.strerror}): make room, or set TMPDIR"
            raise HTTPException(413, what) from error
        yield path


def _append(file: IO[bytes], chunk: bytes) -> None:
    file.write(chunk)
    file.flush()


async def _bounded(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise HTTPException(413, f"the import is larger than the bound of {limit} bytes")
        yield chunk


async def _take(store: Store, prompts: Iterable[ImportedPrompt], counts: Imported) -> None:
    rows = [(Prompt(p.question, p.answer, p.source, p.environment, p.split), p) for p in prompts]
    rho_min = store.config.value_store.rho_min
    priors = [
        prior_of(p.prior_rewards, rho_min) if p.alpha is None or p.beta is None else (p.alpha, p.beta) for _, p in rows
    ]
    await store.upsert([prompt for prompt, _ in rows], priors)
    counts.prompts += len(rows)
    counts.priors += sum(prior is not None for prior in priors)


async def _take_offline(
    store: Store, pairs: list[tuple[str, list[float]]], source: str | None, counts: Imported
) -> None:
    table, rho_min = store.memory.table, store.config.value_store.rho_min
    sources = table.sources if source is None else [source]
    found = [
        (next((one for s in sources if (one := prompt_id(s, text)) in table), None), rewards) for text, rewards in pairs
    ]
    known = {one: rewards for one, rewards in found if one is not None}
    prompts = await store.fetch_prompts(list(known))
    await store.upsert(
        [prompt for prompt in prompts if prompt], [prior_of(rewards, rho_min) for rewards in known.values()]
    )
    counts.prompts += len(known)
    counts.priors += len(known)
    counts.unknown += len(found) - sum(one is not None for one, _ in found)


@reads.get(
    "/export",
    summary="Export prompts and values",
    response_class=StreamingResponse,
    responses={
        200: {"description": "The file, streamed.", "content": FILES},
        **problem_docs(404),
    },
)
async def export(
    store: StoreDep,
    format: Annotated[Format, Query(description="What to write.")] = "ndjson",
    job: Annotated[
        str | None,
        Query(
            pattern=r"^[0-9a-f]{12}$",
            description="offline_values: the estimation job whose rewards are written.",
            examples=[JOB_ID],
        ),
    ] = None,
) -> StreamingResponse:
    """Every prompt with its value, by id; or a job's rewards as the recipe's ``{prompt text: [scores]}``."""
    if format == "offline_values":
        if job is None:
            raise HTTPException(422, "offline_values are an estimation's rewards: name its job")
        if job not in store.memory.jobs:
            raise HTTPException(404, f"no job {job}")
        parts = _offline_values(store, store.memory.jobs[job])
    else:
        parts = _ndjson(store) if format == "ndjson" else _parquet(store)
    disposition = f'attachment; filename="{store.config.run.name}.{format.replace("offline_values", "json")}"'
    return StreamingResponse(parts, media_type=MEDIA[format], headers={"Content-Disposition": disposition})


async def _pages(store: Store) -> AsyncIterator[list[PromptValue]]:
    numbers = np.sort(store.memory.table.id_number)  # a copy, 8 bytes a prompt: memory may be read anew meanwhile
    for start in range(0, len(numbers), ROWS_AT_A_TIME):
        part = [f"{number:016x}" for number in numbers[start : start + ROWS_AT_A_TIME].tolist()]
        memory = store.memory
        rows = [memory.table.row(one) for one in part]
        prompts = await store.fetch_prompts(part)
        both = [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if row is not None and prompt]
        values = views.value_outs(memory, store.config.value_store, store.retention, [row for row, _ in both])
        yield [views.prompt_out(value, prompt) for value, (_, prompt) in zip(values, both, strict=True)]


async def _ndjson(store: Store) -> AsyncIterator[bytes]:
    async for prompts in _pages(store):
        yield exchange.ndjson_lines(prompts)


async def _parquet(store: Store) -> AsyncIterator[bytes]:
    file = exchange.ParquetParts()
    async for prompts in _pages(store):
        if prompts:
            yield await run_in_threadpool(file.add, prompts)
    yield file.finish()


async def _offline_values(store: Store, job: Job) -> AsyncIterator[bytes]:
    """One question in two sources is one key: the scores of both stand under it."""
    last, before = None, "{"
    async for question, scores in _scores(store, job):
        numbers = json.dumps(scores)[1:-1]
        yield (f", {numbers}" if question == last else f"{before}{json.dumps(question)}: [{numbers}").encode()
        last, before = question, "],\n"
    yield b"{}\n" if last is None else b"]}\n"


async def _scores(store: Store, job: Job) -> AsyncIterator[tuple[str, list[float]]]:
    """(question, rewards) of each prompt that has any."""
    step = max(1, ROWS_AT_A_TIME // job.n)
    places = await _equal_questions_together(store, job.prompt_ids)
    for start in range(0, len(places), step):
        part = places[start : start + step]
        items = [str(place * job.n + repetition) for place in part for repetition in range(job.n)]
        found = await store.redis.hmget(store.keys.job_results(job.job_id), items)
        rewards = iter([msgpack.unpackb(data, raw=False)["reward"] if data else None for data in found])
        for prompt in await store.fetch_prompts([job.prompt_ids[place] for place in part]):
            scores = [reward for reward in islice(rewards, job.n) if reward is not None]
            if prompt is not None and scores:
                yield prompt.question, scores


async def _equal_questions_together(store: Store, ids: Sequence[str]) -> list[int]:
    """All places in ``ids``, ordered by their questions' hashes."""
    numbers = np.zeros(len(ids), np.uint64)
    for start in range(0, len(ids), ROWS_AT_A_TIME):
        for place, prompt in enumerate(await store.fetch_prompts(ids[start : start + ROWS_AT_A_TIME]), start):
            if prompt is not None:
                numbers[place] = int.from_bytes(blake2b(prompt.question.encode(), digest_size=8).digest())
    places: list[int] = np.argsort(numbers, kind="stable").tolist()
    return places
