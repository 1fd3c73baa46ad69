"""What happens when the zygote or the gateway is killed in the middle of runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from services.sandbox_gateway import pool, zygote_process
from services.sandbox_gateway.faults import IsolationUnavailable, SandboxFault, fault_of
from services.sandbox_gateway.metrics import Metrics
from services.sandbox_gateway.service import SandboxService
from services.sandbox_gateway.view import find_interpreter
from singlestream.config import SandboxGatewayConfig
from tests.services.sandbox_gateway.gateway import NAMED, Gateway, limit_descriptors

pytestmark = pytest.mark.timeout(400)

BACK_WITHIN_S = 2.0
SLACK = 30.0
"""Tests must not depend on the machine's speed: the aim of two seconds is what the benchmark reports, this is the
bound.
"""


def busy(gateway: Gateway, answers: list[httpx.Response | httpx.TransportError], count: int) -> list[threading.Thread]:
    """Callers whose runs are in progress."""

    def call() -> None:
        try:
            answers.append(
                httpx.post(
                    f"{gateway.url}/v1/execute",
                    json={"code": f"{NAMED}time.sleep(30)", "timeout_s": 40},
                    timeout=60,
                )
            )
        except httpx.TransportError as error:
            answers.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    gateway.wait_for_runs(count)
    return threads


def seconds_until_it_runs(url: str) -> float:
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < 60:
        try:
            answer = httpx.post(f"{url}/v1/execute", json={"code": "print(1)"}, timeout=30)
            if answer.status_code == 200:
                assert answer.json()["stdout"] == "1\n"
                return time.monotonic() - begun_s
        except httpx.TransportError:
            pass
        time.sleep(0.005)
    raise AssertionError("the service did not come back")


@pytest.fixture(scope="module")
def small() -> Iterator[Gateway]:
    """For the tests that do not break it."""
    started = Gateway(preload="[]", slots=4)
    yield started
    assert started.stop() == 0


@pytest.mark.parametrize("victim", ["zygote", "bubblewrap"])
def test_killed_zygote(victim: str, record_property: Callable[[str, object], None]) -> None:
    gateway = Gateway(preload="[]", slots=4)
    try:
        at_rest = gateway.footprint()
        answers: list[Any] = []
        threads = busy(gateway, answers, 4)
        before = gateway.descendants()
        [zygote] = gateway.zygotes()
        (zygote if victim == "zygote" else zygote.parents()[1]).kill()
        back_s = seconds_until_it_runs(gateway.url)
        for thread in threads:
            thread.join(60)
        assert [(a.status_code, a.json()["code"]) for a in answers] == [(500, "sandbox_error")] * 4
        gateway.wait_idle(at_rest)
        _, alive = psutil.wait_procs(before, timeout=60)
        assert not alive
        record_property("back_s", back_s)
        assert back_s < BACK_WITHIN_S * SLACK
        assert 'reason="died"' in gateway.http.get("/metrics").text
    finally:
        assert gateway.stop() == 0


def test_killed_gateway_leaves_no_survivor_and_comes_back(record_property: Callable[[str, object], None]) -> None:
    gateway = Gateway(slots=4)
    answers: list[Any] = []
    threads = busy(gateway, answers, 4)
    family = gateway.descendants()
    gateway.process.send_signal(signal.SIGKILL)
    gateway.process.wait()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 4
    assert all(isinstance(answer, httpx.TransportError) for answer in answers)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, [p.cmdline()[:3] for p in alive]
    begun_s = time.monotonic()
    successor = Gateway(warm=False)
    try:
        seconds_until_it_runs(successor.url)
        back_s = time.monotonic() - begun_s
        record_property("back_s", back_s)
        assert back_s < BACK_WITHIN_S * SLACK
        assert successor.run("import sympy; print(sympy.sqrt(8))", timeout_s=60)["stdout"] == "2*sqrt(2)\n"
    finally:
        assert successor.stop() == 0
        gateway.stop()


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from singlestream.supervisor.child import Child, Spec
spec = Spec("sandbox_gateway", [sys.executable, "-m", "services.sandbox_gateway"], ready=asyncio.Event().wait)
asyncio.run(Child(spec, Path(sys.argv[1])).run())
"""


def test_a_killed_supervisor_takes_the_gateway_with_it(tmp_path: Path) -> None:
    """Started as root too, which changes its user on the way: the kernel forgets the supervisor's wish then."""
    supervisor = Gateway(command=[sys.executable, "-c", SUPERVISOR, str(tmp_path)], preload="[]")
    family = supervisor.descendants()
    try:
        supervisor.process.kill()
        supervisor.process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        supervisor.stop()


PATIENT = """
import sys
from services.sandbox_gateway import __main__, pool, zygote_process
deadlines_s = [float(text) for text in sys.argv[1:]]
del sys.argv[1:]
pool.FIRST_BACKOFF_S = 0.0
start_proven = pool.ZygotePool._start_proven
async def start(*arguments):
    zygote_process.START_DEADLINE_S = deadlines_s.pop(0)
    return await start_proven(*arguments)
pool.ZygotePool._start_proven = start
sys.exit(__main__.main())
"""
"""A gateway whose zygotes have so many seconds each to come up."""


def test_a_gateway_whose_zygotes_are_late_ends_to_be_started_again() -> None:
    """What may pass must not end a run, as exit code 78 would: neither before it has served, nor later."""
    late = ["0"] * pool.MAX_FAILED_STARTS
    gateway = Gateway(command=[sys.executable, "-c", PATIENT, "0", "0", "60", *late], preload="[]")
    try:
        assert "start 2 of 5 failed" in gateway.logged()
        gateway.zygotes()[0].kill()
        assert gateway.process.wait(60) == os.EX_TEMPFAIL, gateway.logged()
    finally:
        gateway.stop()


async def test_late_zygotes_are_no_reason_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller retries ``overloaded`` and not ``isolation_unavailable``, which is kept for hosts that are unfit."""
    monkeypatch.setattr(zygote_process, "START_DEADLINE_S", 0.0)
    monkeypatch.setattr(pool, "FIRST_BACKOFF_S", 0.0)
    told: list[str | None] = []

    def on_start(_kind: str, _reason: str) -> None:
        problem = service.not_ready()
        told.append(None if problem is None else problem.code)

    zygotes = pool.ZygotePool(find_interpreter(sys.executable), (), "/etc/hosts", 1, 1000, 1000.0, on_start)
    service = SandboxService(SandboxGatewayConfig(), 1, zygotes, Metrics())
    try:
        with pytest.raises(SandboxFault, match="was not warm") as raised:
            await zygotes.start()
    finally:
        await zygotes.stop()
    assert not isinstance(raised.value, IsolationUnavailable)
    assert told == ["overloaded"] * pool.MAX_FAILED_STARTS


def test_what_passes_is_told_from_what_does_not() -> None:
    assert not isinstance(fault_of("it ended", ""), IsolationUnavailable)
    assert not isinstance(fault_of("it could not fork", os.strerror(12)), IsolationUnavailable)
    assert isinstance(fault_of("it ended", "bwrap: No permissions to create new namespace"), IsolationUnavailable)


def test_a_killed_run_is_an_outcome_and_its_neighbours_go_on(small: Gateway) -> None:
    results: list[dict[str, Any]] = []
    sleeper = NAMED + "time.sleep(5)\nprint('woke')"
    threads = [threading.Thread(target=lambda: results.append(small.run(sleeper, timeout_s=60))) for _ in range(2)]
    for thread in threads:
        thread.start()
    small.wait_for_runs(1)[-1].kill()
    for thread in threads:
        thread.join(60)
    assert sorted(r["status"] for r in results) == ["killed", "ok"]


def test_killed_spares_are_no_outcome_of_anyone(small: Gateway) -> None:
    """Jails that wait for a program, killed: no snippet is told to have been killed, and others take their place."""
    at_rest = small.footprint()
    [zygote] = small.zygotes()
    spares = zygote.children()
    assert len(spares) >= 8  # of each two the run itself and the first process of its namespace
    for process in spares:
        with contextlib.suppress(psutil.NoSuchProcess):  # the one takes the other with it
            process.kill()
    answers = [small.http.post("/v1/execute", json={"code": "print(1)"}) for _ in range(8)]
    # One that dies as its request arrives is a fault of the sandbox, to be retried.
    assert {a.json().get("stdout", a.json().get("code")) for a in answers} <= {"1\n", "sandbox_error"}
    assert answers[-1].status_code == 200
    small.wait_idle(at_rest)
    assert 'reason="died"' not in small.http.get("/metrics").text


@pytest.mark.parametrize("free", [5, 6], ids=["the namespace's first process", "the run"])
def test_a_process_that_cannot_be_watched_is_not_left_behind(small: Gateway, free: int) -> None:
    """The zygote has descriptors left for an order, and for none or one of the two processes that it asks for."""
    at_rest = small.footprint()
    [zygote] = small.zygotes()
    taken = {int(entry.name) for entry in Path(f"/proc/{zygote.pid}/fd").iterdir()}
    bound = [number for number in range(max(taken) + free + 2) if number not in taken][free]
    try:
        limit_descriptors(zygote, bound)
        # With an input of its own it takes no jail that waits already.
        answer = small.http.post("/v1/execute", json={"code": "print(1)", "stdin": "x"})
    finally:
        limit_descriptors(zygote, 1024)
    assert (answer.status_code, answer.json()["code"]) == (500, "sandbox_error")
    assert "Too many open files" in answer.json()["detail"]
    small.wait_idle(at_rest)


def test_long_runs_step_back(small: Gateway) -> None:
    """Short runs start before long ones on the processor: the kernel's own account of both."""
    asked = (small.run("import os; print(os.getpriority(os.PRIO_PROCESS, 0))")["stdout"] for _ in range(100))
    assert "5\n" in asked  # on a busy machine one may be long before it comes to ask
    waiting = "while os.getpriority(os.PRIO_PROCESS, 0) != 15: time.sleep(0.01)"
    threaded = f"import os, threading, time\ndef f():\n    {waiting}\n    print('back')\nt = threading.Thread(target=f)"
    result = small.run(f"{threaded}\nt.start()\n{waiting}\nt.join()", timeout_s=60)
    assert (result["status"], result["stdout"]) == ("ok", "back\n")
