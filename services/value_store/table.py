"""The table of posteriors in memory: one row a prompt, columns as numpy arrays, texts left in Redis.

About 60 bytes of columns and 12 to 30 of index a prompt. Redis holds the truth: a record of 41 bytes and the source's
name for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.value_store import posterior

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")

RECORD = np.dtype(
    [
        ("alpha", "<f8"),
        ("beta", "<f8"),
        ("z_last", "<f8"),
        ("updated_at_s", "<f8"),
        ("visits", "<u4"),
        ("version", "<i4"),
        ("split", "u1"),
    ]
)
"""A prompt's record in Redis, followed by its source in UTF-8.

``z_last`` is NaN and ``version`` −1 before the first evidence.
"""

_COLUMNS = (
    *((name, RECORD[name]) for name in RECORD.names or ()),
    ("source", np.dtype("u2")),
    ("in_flight", np.dtype("u2")),
)


SORTED_AT_LEAST = 10_000
"""New rows that are put in order at once, or an eighth of the table: a million prompts are sorted some thirty times."""


class Table:
    """Rows of posteriors; a row's number stays for the life of the table.

    Attributes (arrays over all rows, in the record's types):
        alpha, beta: pseudo-counts, > 0.
        z_last: drift clock at the newest evidence; NaN without any.
        version: policy version of the newest evidence; −1 without any.
        visits: leases counted in the posterior.
        updated_at_s: Unix time of the last change.
        split: number in `SPLITS`.
        source: number in `sources`.
        in_flight: outstanding training leases of the prompt: one group's at most.
        id_number: the prompt id as an unsigned integer.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    z_last: NDArray[np.float64]
    updated_at_s: NDArray[np.float64]
    visits: NDArray[np.uint32]
    version: NDArray[np.int32]
    split: NDArray[np.uint8]
    source: NDArray[np.uint16]
    in_flight: NDArray[np.uint16]
    id_number: NDArray[np.uint64]

    def __init__(self) -> None:
        self.sources: list[str] = []
        self._source_number: dict[str, int] = {}
        self._size = 0
        self._sorted: NDArray[np.uint64] = np.zeros(0, np.uint64)  # ids of the first rows
        self._by_id: NDArray[np.int32] = np.zeros(0, np.int32)  # their rows
        self._newer: dict[int, int] = {}  # id → row of the others: a dictionary takes 14 times as much a prompt
        self._buffers = {name: np.zeros(0, dtype) for name, dtype in (*_COLUMNS, ("id_number", np.dtype("u8")))}
        self._expose()

    def __len__(self) -> int:
        return self._size

    def __contains__(self, prompt_id: str) -> bool:
        return self.row(prompt_id) is not None

    def _expose(self) -> None:
        for name, buffer in self._buffers.items():
            setattr(self, name, buffer[: self._size])

    def row(self, prompt_id: str) -> int | None:
        """Row of a prompt, named by 16 hex digits; None where it is not known."""
        number = int(prompt_id, 16)
        if (newer := self._newer.get(number)) is not None:
            return newer
        place = int(self._sorted.searchsorted(np.uint64(number)))
        return int(self._by_id[place]) if place < len(self._sorted) and self._sorted[place] == number else None

    def id(self, row: int) -> str:
        """Prompt id of a row."""
        return f"{int(self.id_number[row]):016x}"

    def source_number(self, source: str) -> int:
        """Number of a source, given out at its first use. Raises ValueError beyond 65,536 sources."""
        if source not in self._source_number:
            if len(self.sources) > np.iinfo(np.uint16).max:
                raise ValueError("at most 65,536 sources")
            self._source_number[source] = len(self.sources)
            self.sources.append(source)
        return self._source_number[source]

    def put(self, ids: Sequence[str], records: Sequence[bytes]) -> None:
        """Insert or overwrite rows from Redis' records.

        A repeated id takes its last record; ``in_flight`` of known rows stays.
        """
        latest = {int(prompt_id, 16): record for prompt_id, record in zip(ids, records, strict=True)}
        rows = self._enter(np.fromiter(latest, np.uint64, len(latest)))
        size = RECORD.itemsize
        fixed = np.frombuffer(b"".join([record[:size] for record in latest.values()]), RECORD)
        for name in RECORD.names or ():
            getattr(self, name)[rows] = fixed[name]
        self.source[rows] = [self.source_number(record[size:].decode()) for record in latest.values()]

    def _enter(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Rows of distinct ids; those that had none get the next ones."""
        rows = np.fromiter((self._newer.get(number, -1) for number in numbers.tolist()), np.int64, len(numbers))
        if len(self._sorted):
            places = np.minimum(self._sorted.searchsorted(numbers), len(self._sorted) - 1)
            rows = np.where(self._sorted[places] == numbers, self._by_id[places], rows)
        new = rows < 0
        rows[new] = range(self._size, self._size + int(new.sum()))
        self._size += int(new.sum())
        self._reserve(self._size)
        self._expose()
        self.id_number[rows[new]] = numbers[new]
        self._newer.update(zip(numbers[new].tolist(), rows[new].tolist(), strict=True))
        if len(self._newer) > max(SORTED_AT_LEAST, self._size // 8):
            self._by_id, self._newer = np.argsort(self.id_number).astype(np.int32), {}
            self._sorted = self.id_number[self._by_id]
        return rows

    def _reserve(self, rows: int) -> None:
        capacity = len(self._buffers["alpha"])
        if rows <= capacity:
            return
        capacity = max(1024, rows, capacity + capacity // 4)
        for name, buffer in self._buffers.items():
            grown = np.zeros(capacity, buffer.dtype)
            grown[: len(buffer)] = buffer
            self._buffers[name] = grown

    def records(self, rows: NDArray[np.int64], **columns: NDArray[np.float64] | NDArray[np.int64]) -> list[bytes]:
        """Redis' records of rows, with some columns replaced: what the table will hold once a change is committed."""
        packed = np.empty(len(rows), RECORD)
        for name in RECORD.names or ():
            packed[name] = columns.get(name, getattr(self, name)[rows])
        data, size = packed.tobytes(), RECORD.itemsize
        sources = [source.encode() for source in self.sources]
        numbers = self.source[rows].tolist()
        return [data[i * size : (i + 1) * size] + sources[number] for i, number in enumerate(numbers)]

    @property
    def v_hat(self) -> NDArray[np.float64]:
        """Posterior means of all rows, in (0, 1)."""
        return posterior.v_hat(self.alpha, self.beta)


def new_record(alpha: float, beta: float, split: Split, source: str, updated_at_s: float) -> bytes:
    """Record of a prompt without visits."""
    row = (alpha, beta, np.nan, updated_at_s, 0, -1, SPLITS.index(split))
    return np.array(row, RECORD).tobytes() + source.encode()
