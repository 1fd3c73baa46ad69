"""REST: prompts and their values."""

from __future__ import annotations

import json
from typing import Annotated

import msgpack
import numpy as np
from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.exceptions import HTTPException

from services.value_store import ndjson, posterior, trajectories, views
from services.value_store.evidence import HISTORY_FIELDS
from services.value_store.examples import NEW_PROMPT
from services.value_store.examples import PROMPT_ID as EXAMPLE_ID
from services.value_store.memory import Memory
from services.value_store.problems import problem_docs
from services.value_store.prompts import Prompt, prior_of
from services.value_store.schemas import PromptIn, ValuesQuery
from services.value_store.store import Store
from services.value_store.table import Split
from services.value_store.views import Filters, Order
from singlestream.clients.value_store_replies import (
    PROMPT_ID,
    History,
    HistoryEntry,
    Ids,
    Page,
    PromptValue,
    Trajectories,
    Value,
    Values,
)
from singlestream.streams.ledger import prompt_id

SCANNED_PER_PAGE = 20_000
"""Prompts whose text one request searches: a page may be short while its cursor goes on."""
SCANNED_AT_A_TIME = 1000
HASHED_CHARACTERS = 64 * 1024 * 1024
"""Of a look-up by texts in every source: this process does nothing else meanwhile."""

reads = APIRouter(prefix="/v1", tags=["prompts"])
writes = APIRouter(prefix="/v1", tags=["prompts"], route_class=ndjson.NdjsonRoute)
LINES = {
    "requestBody": {
        "content": {
            ndjson.MEDIA_TYPE: {
                "schema": {"type": "string", "description": "One prompt a line, as JSON."},
                "example": json.dumps(NEW_PROMPT) + "\n",
            }
        }
    }
}


async def get_store(request: Request) -> Store:
    """The application's store."""
    store: Store = request.app.state.store
    return store


StoreDep = Annotated[Store, Depends(get_store)]
IdPath = Annotated[str, Path(pattern=PROMPT_ID, description="Prompt id.", examples=[EXAMPLE_ID])]
CURSOR = views.pack_cursor(0.5, int(EXAMPLE_ID, 16))
NOT_FOUND = problem_docs(404)


def bound(count: int, limit: int, what: str) -> None:
    """Refuse more than a request may hold."""
    if count > limit:
        raise HTTPException(422, f"{count} {what} in one request; the bound is {limit}")


def read_cursor(cursor: str | None) -> tuple[float, int] | None:
    """The place that a cursor names; None without one."""
    try:
        return views.unpack_cursor(cursor) if cursor else None
    except ValueError as error:
        raise HTTPException(422, str(error)) from error


@writes.post("/prompts", summary="Insert or update prompts in bulk", responses=problem_docs(409), openapi_extra=LINES)
async def upsert(store: StoreDep, prompts: list[PromptIn]) -> Ids:
    """A JSON array, or NDJSON. Source and question make a prompt's id.

    Answer, environment and split of a known prompt are replaced, its value stays. May be repeated safely, also after
    a 503.
    """
    bound(len(prompts), store.config.value_store.max_prompts_per_request, "prompts")
    rho_min = store.config.value_store.rho_min
    packed = [Prompt(p.question, p.answer, p.source, p.environment, p.split) for p in prompts]
    return Ids(ids=await store.upsert(packed, [prior_of(p.prior_rewards, rho_min) for p in prompts]))


@reads.get("/prompts", summary="List prompts")
async def list_prompts(
    store: StoreDep,
    source: Annotated[str | None, Query(description="Only this source.", examples=["multiply"])] = None,
    split: Annotated[Split | None, Query(description="Only this split.")] = None,
    q: Annotated[
        str | None,
        Query(min_length=1, max_length=1000, description="Text in the question, any case.", examples=["47*"]),
    ] = None,
    v_hat_min: Annotated[float | None, Query(ge=0, le=1, description="Least v̂.", examples=[0.1])] = None,
    v_hat_max: Annotated[float | None, Query(ge=0, le=1, description="Greatest v̂.", examples=[0.9])] = None,
    visits_min: Annotated[int | None, Query(ge=0, le=2**32, description="Fewest leases counted.", examples=[1])] = None,
    visits_max: Annotated[int | None, Query(ge=0, le=2**32, description="Most leases counted.", examples=[100])] = None,
    n_eff_min: Annotated[float | None, Query(ge=0, description="Least n_eff, as of now.", examples=[2.0])] = None,
    n_eff_max: Annotated[float | None, Query(ge=0, description="Greatest n_eff, as of now.", examples=[25.0])] = None,
    order: Annotated[Order, Query(description="What to order by.")] = "id",
    descending: Annotated[bool, Query(description="Greatest first.")] = False,
    limit: Annotated[int, Query(ge=1, description="Prompts a page; bounded by max_page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=100, description="From the page before.", examples=[CURSOR])] = None,
) -> Page:
    """Pages follow one another by (order, id). A text search may return a short page with a cursor: go on from it."""
    bound(limit, store.config.value_store.max_page, "prompts a page")
    memory, retention = store.memory, store.retention
    after = read_cursor(cursor)
    filters = Filters(source, split, v_hat_min, v_hat_max, visits_min, visits_max, n_eff_min, n_eff_max)
    rows = views.matching(memory, retention, filters)
    keys = views.order_keys(memory, store.config.value_store, retention, order, rows)
    keys = -keys if descending else keys
    ids = memory.table.id_number[rows]
    found: list[PromptValue] = []
    scanned, step = 0, limit if q is None else SCANNED_AT_A_TIME
    while True:
        places = views.page(keys, ids, step + 1, after)
        more, places = len(places) > step, places[:step]
        scanned += len(places)
        for number, one in enumerate(await _with_texts(store, memory, rows[places].tolist(), q), 1):
            after = (float(keys[places[number - 1]]), int(ids[places[number - 1]]))
            if one is not None:
                found.append(one)
            if len(found) == limit:
                more = more or number < len(places)
                break
        if not more or after is None:
            return Page(prompts=found, cursor=None)
        if len(found) == limit or scanned >= SCANNED_PER_PAGE:
            return Page(prompts=found, cursor=views.pack_cursor(*after))


async def _with_texts(store: Store, memory: Memory, rows: list[int], q: str | None) -> list[PromptValue | None]:
    """Rows of that memory with their texts; None where Redis has none, or one without ``q`` in it."""
    settings = store.config.value_store
    prompts = await store.fetch_prompts([memory.table.id(row) for row in rows])
    wanted = [p is not None and (q is None or q.casefold() in p.question.casefold()) for p in prompts]
    kept = [row for row, keep in zip(rows, wanted, strict=True) if keep]
    shown = iter(views.value_outs(memory, settings, store.retention, kept))
    return [
        views.prompt_out(next(shown), prompt) if keep and prompt is not None else None
        for prompt, keep in zip(prompts, wanted, strict=True)
    ]


@reads.get("/prompts/{prompt_id}", summary="One prompt and its posterior", responses=NOT_FOUND)
async def get_prompt(store: StoreDep, prompt_id: IdPath) -> PromptValue:
    """The interval and n_eff are faded by the policy's drift since the last evidence."""
    memory = store.memory
    row = memory.table.row(prompt_id)
    shown = await _with_texts(store, memory, [row], None) if row is not None else [None]
    if shown[0] is None:
        raise HTTPException(404, f"no prompt {prompt_id}")
    return shown[0]


@reads.get("/prompts/{prompt_id}/history", summary="Every update of one prompt", responses=NOT_FOUND)
async def get_history(
    store: StoreDep, prompt_id: IdPath, limit: Annotated[int, Query(ge=1, le=100_000)] = 256
) -> History:
    """Newest first, at most as many as the store keeps (``history_entries``)."""
    if prompt_id not in store.memory.table:
        raise HTTPException(404, f"no prompt {prompt_id}")
    records = await store.redis.lrange(store.keys.history(prompt_id), 0, limit - 1)
    told = [dict(zip(HISTORY_FIELDS, msgpack.unpackb(record, raw=False), strict=True)) for record in records]
    v_hat, n_eff = (np.array([one[name] for one in told], np.float64) for name in ("v_hat_after", "n_eff"))
    low, high = (bound.tolist() for bound in posterior.interval(v_hat * n_eff, (1.0 - v_hat) * n_eff))
    both = zip(told, low, high, strict=True)
    return History(prompt_id=prompt_id, entries=[HistoryEntry(**one, interval=(a, b)) for one, a, b in both])


@reads.get("/prompts/{prompt_id}/trajectories", summary="The last trajectories of one prompt", responses=NOT_FOUND)
async def get_trajectories(
    store: StoreDep, prompt_id: IdPath, limit: Annotated[int, Query(ge=1, le=16)] = 4
) -> Trajectories:
    """From the newest of the run that are held in memory (64 MiB); a busy run shows a sample of them."""
    if prompt_id not in store.memory.table:
        raise HTTPException(404, f"no prompt {prompt_id}")
    tokenizer = trajectories.find_tokenizer(store.config.run.model)
    found = store.recent.trajectories.of(prompt_id, limit)
    return Trajectories(prompt_id=prompt_id, trajectories=[trajectories.show(one, tokenizer) for one in found])


@reads.post("/values", summary="Values of many prompts")
async def lookup(store: StoreDep, query: ValuesQuery) -> Values:
    """By ids, or by the questions' exact texts; a text's source may be left open."""
    if (query.ids is None) == (query.texts is None):
        raise HTTPException(422, "give either ids or texts")
    table = store.memory.table
    bound(len(query.ids or query.texts or ()), store.config.value_store.max_prompts_per_request, "prompts")
    if query.ids is not None:
        rows = [table.row(one) for one in query.ids]
    else:
        sources = table.sources if query.source is None else [query.source]
        bound(len(sources) * len(query.texts or ()), 1_000_000, "texts × sources")
        bound(len(sources) * sum(map(len, query.texts or ())), HASHED_CHARACTERS, "characters × sources")
        rows = [
            next((row for source in sources if (row := table.row(prompt_id(source, text))) is not None), None)
            for text in query.texts or ()
        ]
    shown: dict[int, Value] = {}
    known = sorted({row for row in rows if row is not None})
    values = views.value_outs(store.memory, store.config.value_store, store.retention, known)
    shown.update(zip(known, values, strict=True))
    return Values(values=[None if row is None else shown[row] for row in rows])
