"""The sandbox gateway against bare ``python -c``: rates, latencies, HTTP's cost, neighbours, and recovery from kills.

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
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.harness import Figure, run
from singlestream.clients.sandbox import SandboxClient
from singlestream.contracts.sandbox import ExecuteRequest
from singlestream.supervisor.child import Child, Spec

SNIPPETS = {
    "print": "print(6 * 7)",
    "numpy": "import numpy as np\nprint(int((np.ones((8, 8)) @ np.ones((8, 8))).sum()))",
    "sympy": "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))",
}
ANSWERS = {"print": "42\n", "numpy": "512\n", "sympy": "[2, 3]\n"}
CALLERS = (1, 4, 16, 64)
SECONDS = {False: 3.0, True: 0.5}
"""How long each side of each row runs, at full length and with --quick; both sides get the same time."""
SLICES = {"print": 8, "numpy": 4, "sympy": 1}
"""Turns of a row's two sides; a slice must be long beside one bare run."""
OVERHEAD_REQUESTS = {False: 300, True: 50}
NEIGHBOUR_TURNS = 4
CORES = len(os.sched_getaffinity(0))
NEIGHBOURS = 2 * CORES - 1
"""All slots but one, so that no one waits for a slot."""
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


HONEST = "sum(i * i for i in range(100_000))"
HOSTILE = (
    "while True: pass",
    "import threading\nfor _ in range(20): threading.Thread(target=lambda: sum(iter(int, 1))).start()",
    "l = []\nwhile True: l.append(bytearray(1 << 20))",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "import os\nwhile True: os.write(1, b'x' * 65536)",
    "n = 0\nwhile True:\n    open(f'/tmp/{n % 900}', 'wb').write(bytes(1 << 14)); n += 1",
)
"""Endless loops, threads, memory, forks, output, files: what a neighbour may do to its host."""


async def beside_neighbours(client: SandboxClient, seconds: float) -> list[Figure]:
    """One honest caller alone, beside honest neighbours, and beside as many hostile ones, in turns."""

    async def keep_running(code: str, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await client.execute(ExecuteRequest(code=code, timeout_s=2, memory_mb=512), deadline_s=60)

    crews: dict[str, tuple[str, ...]] = {"alone": (), "beside_honest": (HONEST,), "beside_hostile": HOSTILE}
    times_s: dict[str, list[float]] = {name: [] for name in crews}
    for turn in range(NEIGHBOUR_TURNS):
        for name, codes in crews.items():
            stop = asyncio.Event()
            # Where there are fewer of them than kinds, the kinds take turns.
            chosen = [codes[(turn * NEIGHBOURS + n) % len(codes)] for n in range(NEIGHBOURS if codes else 0)]
            neighbours = [asyncio.create_task(keep_running(code, stop)) for code in chosen]
            await asyncio.sleep(0.5)
            slice_s, _ = await slice_times(sandboxed(client, "print"), 1, seconds / NEIGHBOUR_TURNS)
            times_s[name] += slice_s
            stop.set()
            await asyncio.gather(*neighbours)
    figures, p99_ms = [], {}
    for name, found in times_s.items():
        rate = _rate(sorted(found), seconds)
        p99_ms[name] = rate.p99_ms
        figures.append(Figure(f"print_c1_{name}_p50_ms", rate.p50_ms, "ms", f"{len(found)} runs"))
        figures.append(Figure(f"print_c1_{name}_p99_ms", rate.p99_ms, "ms", f"{len(found)} runs"))
    for other in ("alone", "beside_honest"):
        ratio = p99_ms["beside_hostile"] / p99_ms[other]
        figures.append(Figure(f"print_c1_p99_hostile_vs_{other}", ratio, "ratio", "1 would be no dependence"))
    return figures


async def back_after_kill(times: int) -> list[Figure]:
    """Seconds from a SIGKILL in the middle of runs to the next answer: of every zygote at once, and of the gateway.

    The gateway runs under the product's own supervisor here, whose pause before a restart counts.
    """
    back_s: dict[str, list[float]] = {"zygotes": [], "gateway": []}
    for victim, found in back_s.items():
        for _ in range(times):
            found.append(await _back_after_kill(victim))
    each = {name: ", ".join(f"{s:.2f}" for s in sorted(found)) for name, found in back_s.items()}
    return [Figure(f"{name}_killed_back_s", statistics.median(s), "s", each[name]) for name, s in back_s.items()]


async def _back_after_kill(victim: str) -> float:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "services.sandbox_gateway"]
    with tempfile.TemporaryDirectory() as folder:
        child = Child(Spec("sandbox_gateway", command, ready=_never, env=environment(port)), Path(folder))
        keeper = asyncio.create_task(child.run())
        try:
            await asyncio.to_thread(wait_until_warm, url)
            async with SandboxClient(url) as client:
                sleeper = ExecuteRequest(code="import time; time.sleep(30)", timeout_s=40)
                running = [asyncio.create_task(client.execute(sleeper, deadline_s=3)) for _ in range(CORES)]
                await asyncio.sleep(0.5)
                gateway = psutil.Process(child.pid)
                for process in gateway.children() if victim == "zygotes" else [gateway]:
                    process.kill()
                back_s = await asyncio.to_thread(seconds_until_answer, url)
                await asyncio.gather(*running, return_exceptions=True)
            return back_s
        finally:
            await child.stop()
            await keeper


async def _never() -> str | None:
    return None


def seconds_until_answer(url: str) -> float:
    """How long until a run has an outcome."""
    begun_s = time.monotonic()
    with httpx.Client(timeout=10) as http:
        while time.monotonic() - begun_s < START_DEADLINE_S:
            try:
                if http.post(f"{url}/v1/execute", json={"code": SNIPPETS["print"]}).status_code == 200:
                    return time.monotonic() - begun_s
            except httpx.TransportError:
                pass
            time.sleep(0.005)
    raise SystemExit("the gateway did not come back")


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
        figures += await beside_neighbours(client, 3 * SECONDS[quick])
        figures.append(Figure("http_overhead_p50_ms", await overhead_ms(client, OVERHEAD_REQUESTS[quick]), "ms", ""))
    return figures


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def environment(port: int) -> dict[str, str]:
    """The gateway's, with built-in settings."""
    return {"SINGLESTREAM_SANDBOX_GATEWAY__PORT": str(port), "SINGLESTREAM_CONFIG": ""}


def start_gateway() -> tuple[subprocess.Popen[bytes], str]:
    """A warm gateway on a free port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.sandbox_gateway"],
        env={**os.environ, **environment(port)},
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_warm(url)
    except BaseException:
        process.kill()
        raise
    return process, url


def wait_until_warm(url: str) -> None:
    """Wait until every kind of zygote is ready."""
    until_s = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < until_s:
        try:
            zygotes = httpx.get(f"{url}/readyz", timeout=5).json().get("zygotes", {"": "starting"})
            if "starting" not in zygotes.values():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit("the gateway did not become ready: python -m services.sandbox_gateway.check says why")


def measure(quick: bool) -> list[Figure]:
    """Start a gateway, measure, stop it; then start those that are killed."""
    process, url = start_gateway()
    try:
        figures = asyncio.run(measure_all(url, quick))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
    return figures + asyncio.run(back_after_kill(1 if quick else 3))


if __name__ == "__main__":
    run("sandbox", measure)
