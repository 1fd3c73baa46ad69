"""What happens when the zygote or the gateway is killed in the middle of runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import httpx
import psutil
import pytest

from tests.services.sandbox_gateway.gateway import Gateway

BACK_WITHIN_S = 2.0
SLACK = 3.0
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
                    json={"code": "import time; time.sleep(30)", "timeout_s": 40},
                    timeout=60,
                )
            )
        except httpx.TransportError as error:
            answers.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    until_s = time.monotonic() + 20
    while gateway.metric("singlestream_sandbox_used_slots") < count:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    time.sleep(0.1)
    return threads


def seconds_until_it_runs(url: str) -> float:
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < 30:
        try:
            answer = httpx.post(f"{url}/v1/execute", json={"code": "print(1)"}, timeout=30)
            if answer.status_code == 200:
                assert answer.json()["stdout"] == "1\n"
                return time.monotonic() - begun_s
        except httpx.TransportError:
            pass
        time.sleep(0.005)
    raise AssertionError("the service did not come back")


def zygotes(gateway: Gateway) -> list[psutil.Process]:
    return [p for p in gateway.descendants() if "inside.zygote" in " ".join(p.cmdline()) and p.name() != "bwrap"]


@pytest.mark.parametrize("victim", ["zygote", "bubblewrap"])
def test_killed_zygote(victim: str) -> None:
    gateway = Gateway(preload="[]", slots=4)
    try:
        idle = len(gateway.descendants())
        answers: list[Any] = []
        threads = busy(gateway, answers, 4)
        before = gateway.descendants()
        assert len(before) > idle
        # The oldest Python is the zygote, its forks are the runs; the oldest process of all is the outer bubblewrap.
        target = min(zygotes(gateway) if victim == "zygote" else before, key=lambda p: (p.create_time(), p.pid))
        target.kill()
        back_s = seconds_until_it_runs(gateway.url)
        for thread in threads:
            thread.join(30)
        assert [(a.status_code, a.json()["code"]) for a in answers] == [(500, "sandbox_error")] * 4
        gateway.wait_idle(idle)
        _, alive = psutil.wait_procs(before, timeout=10)
        assert not alive
        assert back_s < BACK_WITHIN_S * SLACK
        assert 'reason="died"' in gateway.http.get("/metrics").text
    finally:
        assert gateway.stop() == 0


def test_killed_gateway_leaves_no_survivor_and_comes_back() -> None:
    gateway = Gateway(slots=4)
    answers: list[Any] = []
    threads = busy(gateway, answers, 4)
    family = gateway.descendants()
    gateway.process.send_signal(signal.SIGKILL)
    gateway.process.wait()
    begun_s = time.monotonic()
    for thread in threads:
        thread.join(30)
    assert all(isinstance(answer, httpx.TransportError) for answer in answers)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, [p.cmdline()[:3] for p in alive]
    begun_s = time.monotonic()
    successor = Gateway(warm=False)
    try:
        seconds_until_it_runs(successor.url)
        assert time.monotonic() - begun_s < BACK_WITHIN_S * SLACK
        assert successor.run("import sympy; print(sympy.sqrt(8))", timeout_s=60)["stdout"] == "2*sqrt(2)\n"
    finally:
        assert successor.stop() == 0
        gateway.stop()


def test_a_killed_run_is_an_outcome_and_its_neighbours_go_on() -> None:
    gateway = Gateway(preload="[]", slots=4)
    try:
        results: list[dict[str, Any]] = []
        sleeper = "import time\ntime.sleep({})\nprint('woke')"
        threads = [threading.Thread(target=lambda s=s: results.append(gateway.run(sleeper.format(s)))) for s in (2, 9)]
        for thread in threads:
            thread.start()
        until_s = time.monotonic() + 20
        while gateway.metric("singlestream_sandbox_used_slots") < 2:
            assert time.monotonic() < until_s
        time.sleep(0.3)
        newest = max((p for p in zygotes(gateway)), key=lambda p: (p.create_time(), p.pid))
        os.kill(newest.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        assert sorted(r["status"] for r in results) == ["killed", "ok"]
    finally:
        assert gateway.stop() == 0
