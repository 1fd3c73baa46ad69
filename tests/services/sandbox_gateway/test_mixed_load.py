"""Two thousand runs, 48 at a time, three in ten of them hostile: every honest one comes out right."""

from __future__ import annotations

import asyncio
import random

import pytest

from singlestream.clients.sandbox import SandboxClient
from singlestream.contracts.sandbox import ExecuteRequest, ExecuteResult
from tests.services.sandbox_gateway.gateway import Gateway

RUNS, AT_A_TIME, HOSTILE_SHARE = 2000, 48, 0.3

HOSTILE = (
    ("while True: pass", ("timeout",)),
    ("import time\nwhile True: time.sleep(9)", ("timeout",)),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass", ("timeout",)),
    ("l = []\nwhile True: l.append(bytearray(1 << 20))", ("memory_limit",)),
    ("import os\nwhile True: os.write(1, b'x' * 65536)", ("output_limit",)),
    ("import os\nfor _ in range(100):\n    try: os.fork()\n    except OSError: pass\nos._exit(3)", ("error",)),
    ("import threading\nwhile True: threading.Thread(target=threading.Event().wait, daemon=True).start()", ("error",)),
    ("open('/tmp/x', 'wb').write(bytes(15 << 20))\nimport os; os.kill(0, 9)", ("killed",)),
    ("import ctypes; ctypes.string_at(0)", ("killed",)),
    ("import numpy, math; numpy.sum = math.sqrt = None\nraise SystemExit(9)", ("error",)),
    ("import socket; socket.create_connection(('127.0.0.1', 22))", ("error",)),
)


def honest(n: int) -> tuple[str, str]:
    """Code and its standard output."""
    kinds = (
        (f"print({n} * 2)", f"{n * 2}\n"),
        (f"print(sum(range({n})))", f"{sum(range(n))}\n"),
        (f"import numpy as np\nprint(int(np.arange({n}).sum()))", f"{sum(range(n))}\n"),
        (
            f"from sympy import symbols, expand\nx = symbols('x')\nprint(expand((x + {n})**2))",
            f"x**2 + {2 * n}*x + {n * n}\n",
        ),
        (f"import os\nprint(os.listdir('/tmp'))\nopen('/tmp/{n}', 'w').write('x')", "[]\n"),
        (f"print('{n}' * 1000)", f"{n}" * 1000 + "\n"),
    )
    return kinds[n % len(kinds)]


@pytest.mark.timeout(600)
async def test_mixed_runs(gateway: Gateway) -> None:
    draw = random.Random(4)
    at_rest, memory = gateway.footprint(), gateway.memory_bytes()
    turn = asyncio.Semaphore(AT_A_TIME)
    wrong: list[tuple[str, ExecuteResult]] = []

    async with SandboxClient(gateway.url) as client:

        async def run(n: int) -> None:
            hostile = draw.random() < HOSTILE_SHARE
            async with turn:
                if hostile:
                    code, statuses = HOSTILE[n % len(HOSTILE)]
                    # The wall time is only for those that use all of it; the others need room on a busy machine.
                    request = ExecuteRequest(
                        code=code, timeout_s=0.3 if statuses == ("timeout",) else 30, memory_mb=128
                    )
                    result = await client.execute(request, deadline_s=100)
                    right = result.status in statuses
                else:
                    code, stdout = honest(n + 1)
                    result = await client.execute(ExecuteRequest(code=code, timeout_s=30), deadline_s=100)
                    right = (result.status, result.stdout) == ("ok", stdout)
                if not right:
                    wrong.append((code, result))

        await asyncio.gather(*(run(n) for n in range(RUNS)))
        assert not wrong, wrong[:3]
        assert client.counts["unavailable"] == client.counts["retry_sandbox_error"] == 0
        assert (
            sum(client.counts[s] for s in ("ok", "error", "timeout", "memory_limit", "output_limit", "killed")) == RUNS
        )

    gateway.wait_idle(at_rest)
    # Flat, gateway and zygotes together: the first runs fill caches; 2,000 runs that leaked two pages each would show.
    assert gateway.memory_bytes() - memory < 16 << 20
