"""The sandbox gateway against bare ``python -c``, in one run: runs a second, latencies, and what HTTP costs.

Legend: ``{kind}_c{n}`` is n callers at a time running snippets of one kind. Both sides run the same code with the same
interpreter; the gateway is a fresh process on loopback, called through the product's own client.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from benchmarks.harness import Figure, run
from singlestream.clients.sandbox import SandboxClient
from singlestream.contracts.sandbox import ExecuteRequest

SNIPPETS = {
    "print": "print(6 * 7)",
    "numpy": "import numpy as np\nprint(int((np.ones((8, 8)) @ np.ones((8, 8))).sum()))",
    "sympy": "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))",
}
ANSWERS = {"print": "42\n", "numpy": "512\n", "sympy": "[2, 3]\n"}
CALLERS = (1, 4, 16, 64)
SECONDS = {False: 4.0, True: 0.5}
"""How long each side of each row runs, at full length and with --quick; both sides get the same time."""
SLICES = {"print": 8, "numpy": 4, "sympy": 1}
"""Turns of a row's two sides; a slice must be long beside one bare run."""
OVERHEAD_REQUESTS = {False: 300, True: 50}
START_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Rate:
    """Runs of one side of one row."""

    per_second: float
    p50_ms: float
    p99_ms: float


async def slice_times(call: Callable[[], Awaitable[None]], callers: int, seconds: float) -> tuple[list[float], float]:
    """Let so many callers call for so long: seconds of each call, and of the whole."""
    times_s: list[float] = []
    begun_s = time.perf_counter()

    async def caller() -> None:
        while time.perf_counter() - begun_s < seconds:
            started_s = time.perf_counter()
            await call()
            times_s.append(time.perf_counter() - started_s)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return times_s, time.perf_counter() - begun_s


async def rates(calls: list[Callable[[], Awaitable[None]]], callers: int, seconds: float, slices: int) -> list[Rate]:
    """Measure several sides in turns, so that what else the machine does falls on all of them alike."""
    times_s: list[list[float]] = [[] for _ in calls]
    elapsed_s = [0.0 for _ in calls]
    for _ in range(slices):
        for side, call in enumerate(calls):
            slice_s, whole_s = await slice_times(call, callers, seconds / slices)
            times_s[side] += slice_s
            elapsed_s[side] += whole_s
    return [_rate(sorted(times), elapsed) for times, elapsed in zip(times_s, elapsed_s, strict=True)]


def _rate(times_s: list[float], elapsed_s: float) -> Rate:
    p99_s = times_s[min(len(times_s) - 1, int(0.99 * len(times_s)))]
    return Rate(len(times_s) / elapsed_s, 1e3 * statistics.median(times_s), 1e3 * p99_s)


async def bare(kind: str) -> None:
    """One snippet in a fresh Python without any isolation."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SNIPPETS[kind], stdout=subprocess.PIPE)
    stdout, _ = await process.communicate()
    assert stdout.decode() == ANSWERS[kind]


def sandboxed(client: SandboxClient, kind: str) -> Callable[[], Awaitable[None]]:
    """One snippet through the gateway."""
    request = ExecuteRequest(code=SNIPPETS[kind], timeout_s=60)

    async def call() -> None:
        result = await client.execute(request, deadline_s=120)
        assert result.stdout == ANSWERS[kind], result

    return call


async def overhead_ms(client: SandboxClient, requests: int) -> float:
    """Median of what a caller waits beyond the run itself: client, HTTP, admission, fork and reaping."""
    beyond_s = []
    for _ in range(requests):
        started_s = time.perf_counter()
        result = await client.execute(ExecuteRequest(code=SNIPPETS["print"]), deadline_s=60)
        beyond_s.append(time.perf_counter() - started_s - result.usage.wall_s)
    return 1e3 * statistics.median(beyond_s)


async def beside_hostile(client: SandboxClient, seconds: float) -> list[Figure]:
    """One honest caller alone, and beside as many endless loops as there are cores."""
    [alone] = await rates([sandboxed(client, "print")], 1, seconds, 1)
    loops = len(os.sched_getaffinity(0))
    endless = ExecuteRequest(code="while True: pass", timeout_s=seconds + 2, cpu_s=60)
    neighbours = [asyncio.create_task(client.execute(endless, deadline_s=60)) for _ in range(loops)]
    await asyncio.sleep(1)
    [beside] = await rates([sandboxed(client, "print")], 1, seconds, 1)
    await asyncio.gather(*neighbours)
    return [
        Figure("print_c1_beside_hostile_p50_ms", beside.p50_ms, "ms", f"{alone.p50_ms:.1f} alone"),
        Figure("print_c1_beside_hostile_p99_ms", beside.p99_ms, "ms", f"{alone.p99_ms:.1f} alone"),
    ]


async def measure_all(url: str, quick: bool) -> list[Figure]:
    """All rows, the two sides of a row in turns."""
    figures = []
    async with SandboxClient(url) as client:
        for kind in SNIPPETS:
            for callers in CALLERS:
                sides: list[Callable[[], Awaitable[None]]] = [sandboxed(client, kind), functools.partial(bare, kind)]
                ours, theirs = await rates(sides, callers, SECONDS[quick], 1 if quick else SLICES[kind])
                row = f"{kind}_c{callers}"
                against = f"bare python -c: {theirs.per_second:.1f}/s, p50 {theirs.p50_ms:.1f} ms"
                figures += [
                    Figure(f"{row}_vs_bare", ours.per_second / theirs.per_second, "ratio", against),
                    Figure(f"{row}_per_second", ours.per_second, "runs/s", f"{theirs.per_second:.1f} bare"),
                    Figure(f"{row}_p50_ms", ours.p50_ms, "ms", f"{theirs.p50_ms:.1f} bare"),
                    Figure(f"{row}_p99_ms", ours.p99_ms, "ms", f"{theirs.p99_ms:.1f} bare"),
                ]
        figures += await beside_hostile(client, SECONDS[quick])
        figures.append(Figure("http_overhead_p50_ms", await overhead_ms(client, OVERHEAD_REQUESTS[quick]), "ms", ""))
    return figures


def start_gateway() -> tuple[subprocess.Popen[bytes], str]:
    """A warm gateway on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "SINGLESTREAM_SANDBOX_GATEWAY__PORT": str(port)}
    environment.pop("SINGLESTREAM_CONFIG", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "services.sandbox_gateway"], env=environment, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    until_s = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            zygotes = httpx.get(f"{url}/readyz", timeout=5).json().get("zygotes", {"": "starting"})
            if "starting" not in zygotes.values():
                return process, url
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    process.kill()
    raise SystemExit("the gateway did not become ready: python -m services.sandbox_gateway.check says why")


def measure(quick: bool) -> list[Figure]:
    """Start a gateway, measure, stop it."""
    process, url = start_gateway()
    try:
        return asyncio.run(measure_all(url, quick))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


if __name__ == "__main__":
    run("sandbox", measure)
