"""Formats in which prompts and values come and go: NDJSON, Parquet, and the reference recipe's ``offline_values.json``.

All of them are read and written a stretch at a time: at most `ROWS_AT_A_TIME` prompts, and about `STRETCH_BYTES`.
"""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
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
STRETCH_BYTES = 16 * 1024 * 1024
"""Of an import, taken at once: long prompts come fewer at a time."""
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
    number = size = 0
    async for line in _lines(chunks):
        number += 1
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadImport(f"line {number}: not JSON: {error}") from error
        prompts.append(_parse(row, f"line {number}"))
        size += len(line)
        if len(prompts) == ROWS_AT_A_TIME or size >= STRETCH_BYTES:
            yield prompts
            prompts, size = [], 0
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
            for batch in file.iter_batches(_rows_at_a_time(file.metadata), columns=wanted):
                rows = batch.to_pylist()
                yield [_parse(row, f"row {number + i}") for i, row in enumerate(rows, 1)]
                number += len(rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadImport(f"not a Parquet file that can be read: {error}") from error


def _rows_at_a_time(about: pq.FileMetaData) -> int:
    size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    return int(max(1, min(ROWS_AT_A_TIME, STRETCH_BYTES * about.num_rows // max(1, size))))


async def read_offline_values(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[tuple[str, list[float]]]]:
    """(prompt text, rewards) from the recipe's ``{text: [scores]}``; like the recipe, a score above 0 is a success.

    Raises:
        BadImport: it is not such an object.
    """
    found: list[tuple[str, list[float]]] = []
    pairs = _pairs(found)
    next(pairs)
    parser = ijson.basic_parse_coro(pairs, use_float=True)
    read = size = 0
    try:
        async for chunk in chunks:
            if not chunk:
                continue  # to the parser it would be the end
            parser.send(chunk)
            size += len(chunk)
            if len(found) >= ROWS_AT_A_TIME or (found and size >= STRETCH_BYTES):
                yield found[:]
                read += len(found)
                size = 0
                del found[:]
            elif size > STRETCH_BYTES:
                raise BadImport(f"prompt {read + 1} is longer than the bound of {STRETCH_BYTES} bytes")
        parser.close()
    except (ijson.JSONError, ValueError) as error:
        raise BadImport(f"after {read + len(found)} prompts: not JSON: {error}") from error
    if found:
        yield found
    elif not read:
        raise BadImport("expected an object {prompt text: [scores]} with at least one prompt")


def _pairs(found: list[tuple[str, list[float]]]) -> Generator[None, tuple[str, Any], None]:
    """Append a pair to ``found`` for every prompt in the parser's events; what is nested deeper is refused at once."""
    text: str | None = None
    scores: list[float] | None = None
    number = 0
    while True:
        event, value = yield
        if event == "map_key":
            text, number = value, number + 1
        elif event == "start_array" and text is not None and scores is None:
            scores = []
        elif event == "number" and scores is not None:
            scores.append(float(value > 0))
        elif event == "end_array" and text is not None and scores is not None:
            found.append((text, scores))
            text = scores = None
        elif text is not None:
            raise BadImport(f"prompt {number} ({text[:60]!r}): expected a list of finite scores")
        elif event not in ("start_map", "end_map"):
            raise BadImport("expected an object {prompt text: [scores]} with at least one prompt")


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
