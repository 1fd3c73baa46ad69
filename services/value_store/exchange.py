"""Formats in which prompts and values come and go: NDJSON, Parquet, and the reference recipe's ``offline_values.json``.

All of them are read and written a stretch at a time, so a million prompts need a few megabytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import ijson
import pyarrow as pa
import pyarrow.json as json_reader
import pyarrow.parquet as pq
from pydantic import ValidationError

from services.value_store.schemas import ImportedPrompt
from singlestream.clients.value_store_replies import PromptValue
from singlestream.errors import SinglestreamError

ROWS_AT_A_TIME = 1000
MAX_LINE_BYTES = 8 * 1024 * 1024
"""Longest line of NDJSON."""

COLUMNS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("source", pa.string()),
        ("environment", pa.string()),
        ("split", pa.string()),
        ("alpha", pa.float64()),
        ("beta", pa.float64()),
        ("v_hat", pa.float64()),
        ("n_eff", pa.float64()),
        ("visits", pa.int64()),
        ("version", pa.int64()),
        ("updated_at_s", pa.float64()),
    ]
)
"""Columns of an export, in both formats; an import reads those of `ImportedPrompt` and passes over the others."""


class BadImport(SinglestreamError):
    """An import cannot be read; the text names the place."""


def _parse(row: Any, place: str) -> ImportedPrompt:
    if not isinstance(row, dict):
        raise BadImport(f"{place}: expected an object")
    try:
        return ImportedPrompt.model_validate({name: value for name, value in row.items() if value is not None})
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise BadImport(f"{place}: {found}") from error


async def read_ndjson(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[ImportedPrompt]]:
    """Prompts from NDJSON, a stretch at a time. Raises `BadImport` with the line's number, from 1."""
    prompts: list[ImportedPrompt] = []
    number = 0
    async for line in _lines(chunks):
        number += 1
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadImport(f"line {number}: not JSON: {error}") from error
        prompts.append(_parse(row, f"line {number}"))
        if len(prompts) == ROWS_AT_A_TIME:
            yield prompts
            prompts = []
    if prompts:
        yield prompts


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_LINE_BYTES:
            raise BadImport(f"a line is longer than the bound of {MAX_LINE_BYTES} bytes")
    if rest:
        yield rest


def read_parquet(path: Path) -> Iterator[list[ImportedPrompt]]:
    """Prompts from a Parquet file, a stretch at a time. Raises `BadImport` with the row's number, from 1."""
    try:
        with pq.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in ImportedPrompt.model_fields]
            number = 0
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=wanted):
                rows = batch.to_pylist()
                yield [_parse(row, f"row {number + i}") for i, row in enumerate(rows, 1)]
                number += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise BadImport(f"not a Parquet file that can be read: {error}") from error


async def read_offline_values(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[tuple[str, list[float]]]]:
    """(prompt text, rewards) from the recipe's ``{text: [scores]}``; like the recipe, a score above 0 is a success.

    Raises:
        BadImport: it is not such an object.
    """
    found: Any = ijson.sendable_list()
    parser = ijson.kvitems_coro(found, "", use_float=True)
    read = 0
    try:
        async for chunk in chunks:
            with contextlib.suppress(StopIteration):  # the object has ended
                parser.send(chunk)
            if len(found) >= ROWS_AT_A_TIME:
                yield [_offline(pair, read + i) for i, pair in enumerate(found, 1)]
                read += len(found)
                del found[:]
        parser.close()
    except (ijson.JSONError, ValueError, UnicodeDecodeError) as error:
        raise BadImport(f"after {read + len(found)} prompts: not JSON: {error}") from error
    if found:
        yield [_offline(pair, read + i) for i, pair in enumerate(found, 1)]
    elif not read:
        raise BadImport("expected an object {prompt text: [scores]} with at least one prompt")


def _offline(pair: tuple[str, Any], number: int) -> tuple[str, list[float]]:
    text, scores = pair
    numbers = isinstance(scores, list) and all(
        isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score) for score in scores
    )
    if not numbers:
        raise BadImport(f"prompt {number} ({text[:60]!r}): expected a list of finite scores")
    return text, [float(score > 0) for score in scores]


def ndjson_lines(prompts: Sequence[PromptValue]) -> bytes:
    """Prompts as NDJSON."""
    rows = (prompt.model_dump(include=set(COLUMNS.names)) for prompt in prompts)
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


class ParquetParts:
    """A Parquet file that is written a stretch at a time; what is ready can be sent on."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(_Forward(self._sink), COLUMNS)

    def add(self, prompts: Sequence[PromptValue]) -> bytes:
        """Write prompts, at least one, as a row group; returns the bytes that are ready."""
        # Arrow reads the lines itself: to take Python's objects it would load all of pandas first.
        lines = ndjson_lines(prompts)
        whole = json_reader.ReadOptions(use_threads=False, block_size=len(lines) + 1)
        columns = json_reader.ParseOptions(explicit_schema=COLUMNS, unexpected_field_behavior="ignore")
        self._writer.write_table(json_reader.read_json(io.BytesIO(lines), whole, columns))
        return self._drain()

    def finish(self) -> bytes:
        """The rest of the file."""
        self._writer.close()
        return self._drain()

    def _drain(self) -> bytes:
        data = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return data


class _Forward:
    """A sink that only grows, as Arrow's writer needs it: it asks how many bytes went through, never to seek back."""

    closed = False

    def __init__(self, sink: io.BytesIO) -> None:
        self._sink, self._written = sink, 0

    def write(self, data: Any) -> int:
        size = self._sink.write(bytes(data))
        self._written += size
        return size

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
