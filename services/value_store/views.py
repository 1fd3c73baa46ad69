"""Rows of the table as the REST interface shows them: values, filtered and ordered pages, histograms."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from services.value_store import issuing, posterior
from services.value_store.memory import Memory
from services.value_store.posterior import Retention
from services.value_store.prompts import Prompt
from services.value_store.table import SPLITS, Split
from singlestream.clients.value_store_replies import Bin, PromptValue, Value
from singlestream.config import ValueStoreConfig

Order = Literal["id", "value", "weight", "visits", "n_eff", "updated"]

_CURSOR = struct.Struct("<dQ")


@dataclass(frozen=True)
class Filters:
    """Which rows a list shows; None leaves a bound open."""

    source: str | None = None
    split: Split | None = None
    v_hat_min: float | None = None
    v_hat_max: float | None = None
    visits_min: int | None = None
    visits_max: int | None = None
    n_eff_min: float | None = None
    n_eff_max: float | None = None


def faded_n_eff(memory: Memory, retention: Retention) -> NDArray[np.float64]:
    """n_eff of all rows as it is now, faded by the policy's drift since each one's last evidence."""
    return (memory.table.alpha + memory.table.beta) * issuing.fade_of(memory, retention)


def value_outs(memory: Memory, settings: ValueStoreConfig, retention: Retention, rows: Sequence[int]) -> list[Value]:
    """Posteriors of rows. Built without validation: the table holds what the model asks for."""
    index, table = np.array(rows, np.int64), memory.table
    alpha, beta = table.alpha[index], table.beta[index]
    fade = issuing.fade_of(memory, retention, index)
    fields: dict[str, NDArray[Any]] = {
        "alpha": alpha,
        "beta": beta,
        "v_hat": posterior.v_hat(alpha, beta),
        "weight": issuing.all_weights(memory, settings, retention, rows=index),
        "n_eff": (alpha + beta) * fade,
        "visits": table.visits[index],
        "updated_at_s": table.updated_at_s[index],
        "in_flight": table.in_flight[index] > 0,
    }
    others = (*posterior.interval(alpha * fade, beta * fade), table.version[index], table.source[index])
    columns: tuple[NDArray[Any], ...] = (*others, table.split[index], *fields.values())
    return [
        Value.model_construct(
            prompt_id=table.id(row),
            interval=(low, high),
            version=version if version >= 0 else None,
            source=table.sources[source],
            split=SPLITS[split],
            **dict(zip(fields, numbers, strict=True)),
        )
        for row, low, high, version, source, split, *numbers in zip(
            rows, *(column.tolist() for column in columns), strict=True
        )
    ]


def prompt_out(value: Value, prompt: Prompt) -> PromptValue:
    """A value with its prompt's text."""
    text = {"question": prompt.question, "answer": prompt.answer, "environment": prompt.environment}
    fields: dict[str, Any] = {**value.__dict__, **text}
    return PromptValue.model_construct(**fields)


def matching(memory: Memory, retention: Retention, filters: Filters) -> NDArray[np.int64]:
    """Rows that pass the filters."""
    table = memory.table
    keep = np.ones(len(table), np.bool_)
    if filters.split is not None:
        keep &= table.split == SPLITS.index(filters.split)
    if filters.source is not None:
        if filters.source not in table.sources:
            return np.empty(0, np.int64)
        keep &= table.source == table.source_number(filters.source)
    columns = (
        (filters.v_hat_min, filters.v_hat_max, lambda: table.v_hat),
        (filters.visits_min, filters.visits_max, lambda: table.visits),
        (filters.n_eff_min, filters.n_eff_max, lambda: faded_n_eff(memory, retention)),
    )
    for low, high, column in columns:
        if low is not None:
            keep &= column() >= low
        if high is not None:
            keep &= column() <= high
    return np.flatnonzero(keep)


def order_keys(
    memory: Memory, settings: ValueStoreConfig, retention: Retention, order: Order, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What rows are ordered by, ascending; rows of equal keys follow by id."""
    table = memory.table
    if order == "id":
        return np.zeros(len(rows))
    if order == "value":
        return posterior.v_hat(table.alpha[rows], table.beta[rows])
    if order == "weight":
        return issuing.all_weights(memory, settings, retention, rows=rows)
    if order == "visits":
        return table.visits[rows].astype(np.float64)
    if order == "updated":
        return table.updated_at_s[rows]
    return faded_n_eff(memory, retention)[rows]


def page(
    keys: NDArray[np.float64], ids: NDArray[np.uint64], limit: int, after: tuple[float, int] | None
) -> NDArray[np.int64]:
    """Places of the ``limit`` smallest (key, id) pairs beyond ``after``, in order.

    Costs a few passes, not a sort of everything.
    """
    places = np.arange(len(keys))
    if after is not None:
        key, number = after
        places = places[(keys > key) | ((keys == key) & (ids > np.uint64(number)))]
    if len(places) > limit:
        bound = np.partition(keys[places], limit - 1)[limit - 1]
        below, ties = places[keys[places] < bound], places[keys[places] == bound]
        room = limit - len(below)
        if len(ties) > room:
            ties = ties[np.argpartition(ids[ties], room - 1)[:room]]
        places = np.concatenate([below, ties])
    return np.asarray(places[np.lexsort((ids[places], keys[places]))])


def pack_cursor(key: float, number: int) -> str:
    """The place behind a row, as clients carry it."""
    return base64.urlsafe_b64encode(_CURSOR.pack(key, number)).decode()


def unpack_cursor(text: str) -> tuple[float, int]:
    """Inverse of `pack_cursor`. Raises ValueError for anything else."""
    try:
        key, number = _CURSOR.unpack(base64.urlsafe_b64decode(text.encode()))
    except (binascii.Error, struct.error, UnicodeEncodeError) as error:
        raise ValueError("cursor: not one that this list gave out") from error
    if not np.isfinite(key):
        raise ValueError("cursor: not one that this list gave out")
    return key, number


def histogram(values: NDArray[np.float64], edges: Sequence[float]) -> list[Bin]:
    """Counts between edges; values beyond the last edge count in the last bar."""
    top = np.nextafter(edges[-1], -np.inf)
    counts, _ = np.histogram(np.minimum(values, top), bins=np.array(edges))
    return [
        Bin(low=low, high=high, count=int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
