"""Import and export of many prompts over REST: what they cost in time, and at the most in memory of the store."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.harness import Figure

LINES_AT_A_TIME = 2000


def resident_mb(pid: int, peak: bool = False) -> float:
    """Resident memory of a process in MB, now or at its peak."""
    name = "VmHWM:" if peak else "VmRSS:"
    [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith(name)]
    return int(line.split()[1]) / 1000


async def _lines(prompts: int) -> AsyncIterator[bytes]:
    for start in range(0, prompts, LINES_AT_A_TIME):
        rows = (
            {
                "question": f"question {i}: what is {i} + {i}?",
                "answer": str(2 * i),
                "source": "bench",
                "alpha": 1.0,
                "beta": 2.0,
            }
            for i in range(start, min(start + LINES_AT_A_TIME, prompts))
        )
        yield b"".join(json.dumps(row).encode() + b"\n" for row in rows)


async def _pieces(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


async def measure_exchange(url: str, pid: int, prompts: int) -> list[Figure]:
    """Import prompts into an empty store, export them in both formats, and import them again from their own Parquet.

    The store is the process ``pid`` at ``url``.
    """
    empty_mb, seconds = resident_mb(pid), dict[str, float]()
    async with httpx.AsyncClient(base_url=url, timeout=600.0) as client:
        with _timed(seconds, "import_ndjson"):
            reply = await client.post("/v1/import?format=ndjson", content=_lines(prompts))
        assert reply.json().get("prompts") == prompts, reply.text
        for form in ("ndjson", "parquet"):
            with _timed(seconds, f"export_{form}"):
                async with client.stream("GET", f"/v1/export?format={form}") as stream:
                    stream.raise_for_status()
                    exported = [chunk async for chunk in stream.aiter_bytes()]
            assert sum(map(len, exported)) > prompts
        with _timed(seconds, "import_parquet"):
            reply = await client.post("/v1/import?format=parquet", content=_pieces(exported))
        assert reply.json().get("prompts") == prompts, reply.text
    figures = [Figure(f"{name}_s", value, "s", f"{prompts} prompts") for name, value in seconds.items()]
    peak_mb, held_mb = resident_mb(pid, peak=True), resident_mb(pid)
    return [
        *figures,
        Figure("exchange_peak_mb", peak_mb, "MB", f"the store at its peak; {empty_mb:.0f} empty, {held_mb:.0f} after"),
    ]
