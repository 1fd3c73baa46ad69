"""The HTTP interface: outcomes, refusals, overload, disconnection, draining."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from services.sandbox_gateway import app
from services.sandbox_gateway.problems import Problem
from singlestream.contracts.sandbox import ExecuteResult
from tests.services.sandbox_gateway.gateway import Gateway

pytestmark = pytest.mark.timeout(400)


def problem_of(answer: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, object] = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert {"type", "title", "detail"} <= set(body)
    return body


@pytest.fixture(scope="module")
def narrow() -> Iterator[Gateway]:
    """Two slots, a queue of two, and patience for what a busy machine may take between two lines of a test."""
    started = Gateway(slots=2, queue_per_slot=1, queue_timeout_s=5, preload="[]", memory_mb=128)
    yield started
    assert started.stop() == 0


def test_outcome_has_every_field(gateway: Gateway) -> None:
    result = gateway.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nraise ValueError('why')")
    parsed = ExecuteResult.model_validate(result)
    assert (parsed.status, parsed.exit_code, parsed.signal, parsed.stdout) == ("error", 1, None, "out\n")
    assert parsed.stderr.startswith("err\nTraceback")
    assert parsed.error is not None
    assert (parsed.error.type, parsed.error.message, parsed.error.line) == ("ValueError", "why", 4)
    assert (parsed.stdout_bytes, parsed.stdout_truncated) == (4, False)
    assert parsed.usage.wall_s > 0
    assert parsed.usage.max_rss_mb > 1
    assert len(parsed.policy_version) == 12


def test_partial_output_survives_a_timeout(gateway: Gateway) -> None:
    for timeout_s in (0.5, 10):  # on a busy machine it may not have come to its print
        result = gateway.run("print('no newline', end='')\nwhile True: pass", timeout_s=timeout_s)
        if result["stdout"]:
            break
    assert (result["status"], result["signal"], result["stdout"]) == ("timeout", 9, "no newline")
    assert result["usage"]["wall_s"] >= 0.5


def test_long_output_keeps_head_and_tail(gateway: Gateway) -> None:
    before = gateway.metric("singlestream_sandbox_truncated_total")
    result = gateway.run("print('a' * 100_000 + 'z' * 100_000)", max_output_bytes=1000)
    assert gateway.metric("singlestream_sandbox_truncated_total") == before + 1
    assert result["status"] == "ok"
    assert (result["stdout_truncated"], result["stdout_bytes"]) == (True, 200_001)
    assert result["stdout"] == "a" * 500 + "\n… 199001 bytes left out …\n" + "z" * 499 + "\n"
    assert gateway.run("print('x')", max_output_bytes=0)["stdout_bytes"] == 2


def test_output_is_drained_however_much(gateway: Gateway) -> None:
    result = gateway.run("for i in range(70): print('y' * 99_999)")
    assert (result["status"], result["stdout_bytes"]) == ("ok", 7_000_000)


def test_seed_repeats_a_run(gateway: Gateway) -> None:
    draws = "print(random.random(), numpy.random.rand(), rng.random())"
    code = f"import random, numpy\nfrom sympy.core.random import rng\n{draws}"
    first, second, other = (gateway.run(code, seed=seed)["stdout"] for seed in (7, 7, 8))
    assert first == second != other
    assert gateway.run(code)["stdout"] != gateway.run(code)["stdout"]


def test_memory_limit_counts_beyond_the_interpreter(gateway: Gateway) -> None:
    for library in ("", "import numpy, pandas\n"):
        assert gateway.run(f"{library}x = bytearray(50 << 20); print(len(x))", memory_mb=64)["status"] == "ok"
        result = gateway.run(f"{library}x = bytearray(70 << 20)", memory_mb=64)
        assert (result["status"], result["error"]["type"]) == ("memory_limit", "MemoryError")
        assert "MemoryError" in result["stderr"]


def test_request_id_comes_back(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/execute", json={"code": "1", "request_id": "abc"})
    assert answer.headers["x-request-id"] == "abc"
    refused = gateway.http.post(
        "/v1/execute", json={"code": "1", "request_id": "abc", "memory_mb": 4096, "timeout_s": 61}
    )
    problem_of(refused, 422, "invalid_request")


WRONG_BODIES = (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"code": 1}', b'{"code": "\\ud800"}', b'{"code": "1", "unknown": 2}',
    b'{"code": "1", "timeout_s": 0}', b'{"code": "1", "timeout_s": 60.1}', b'{"code": "1", "timeout_s": "NaN"}',
    b'{"code": "1", "memory_mb": 63}', b'{"code": "1", "memory_mb": 4097}', b'{"code": "1", "cpu_s": -1}',
    b'{"code": "1", "seed": -1}', b'{"code": "1", "max_output_bytes": -1}',
)  # fmt: skip


@pytest.mark.parametrize("body", WRONG_BODIES)
def test_wrong_requests_are_refused(gateway: Gateway, body: bytes) -> None:
    problem_of(gateway.http.post("/v1/execute", content=body), 422, "invalid_request")


def test_large_requests_are_refused(gateway: Gateway) -> None:
    assert gateway.run("#" + "x" * (256 * 1024 - 1))["status"] == "ok"
    assert gateway.run("import sys; print(len(sys.stdin.read()))", stdin="x" * (1 << 20))["stdout"] == "1048576\n"
    for request in (
        {"code": "#" * (256 * 1024 + 1)},
        {"code": "é" * (128 * 1024 + 1)},
        {"code": "1", "stdin": "x" * ((1 << 20) + 1)},
    ):
        problem_of(gateway.http.post("/v1/execute", json=request), 413, "too_large")
    problem_of(gateway.http.post("/v1/execute", content=b" " * (9 << 20)), 413, "too_large")


async def test_a_body_that_stalls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_DEADLINE_S", 0.05)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(Problem, match="the body") as raised:
        async with asyncio.timeout(60):
            await app._read_body(Request({"type": "http", "headers": []}, receive))
    answer = raised.value.response()
    assert (answer.status_code, raised.value.code) == (408, "request_timeout")
    assert answer.headers["connection"] == "close"


def test_unknown_paths_and_methods(gateway: Gateway) -> None:
    problem_of(gateway.http.get("/v2"), 404, "not_found")
    problem_of(gateway.http.get("/v1/execute"), 405, "method_not_allowed")


def test_openapi_documents_requests_results_and_problems(gateway: Gateway) -> None:
    document = gateway.http.get("/openapi.json").json()
    operation = document["paths"]["/v1/execute"]["post"]
    assert set(operation["responses"]) == {"200", "408", "413", "422", "429", "500", "503", "504"}
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert all(field.get("description") for field in schema["properties"].values())
    assert operation["requestBody"]["content"]["application/json"]["examples"]
    for path in ("/v1/execute", "/healthz", "/readyz", "/metrics"):
        assert next(iter(document["paths"][path].values()))["summary"]
    result = document["components"]["schemas"]["ExecuteResult"]
    assert all(field.get("description") for field in result["properties"].values())
    # OpenAPI generators drop nulls from examples; a field of an outcome is never absent.
    ExecuteResult.model_validate({"exit_code": None, "signal": None, "error": None, **result["examples"][0]})


def test_health_and_metrics(gateway: Gateway) -> None:
    assert gateway.http.get("/healthz").json() == {"status": "ok"}
    assert gateway.http.get("/readyz").json()["zygotes"] == {"plain": "ready", "maths": "ready", "libraries": "ready"}
    before = gateway.metric("singlestream_sandbox_runs_total")
    gateway.run("1")
    assert gateway.metric("singlestream_sandbox_runs_total") == before + 1


def test_overload_queues_then_refuses_then_times_out(narrow: Gateway) -> None:
    def post() -> httpx.Response:
        return httpx.post(f"{narrow.url}/v1/execute", json={"code": "1"}, timeout=60)

    with narrow.holding(runs=2, slots=2), ThreadPoolExecutor(2) as callers:
        patient = [callers.submit(post) for _ in range(2)]
        narrow.wait_for_metric("queued", 2)
        refused = post()
        assert problem_of(refused, 429, "overloaded")["retry_after_s"] == int(refused.headers["retry-after"]) >= 1
        for waiting in patient:
            problem_of(waiting.result(), 504, "queue_timeout")
    assert narrow.run("print(1)")["stdout"] == "1\n"


def test_memory_takes_slots(narrow: Gateway) -> None:
    """256 MiB are both slots of 128: beside it nothing else runs."""
    problem_of(narrow.http.post("/v1/execute", json={"code": "1", "memory_mb": 300}), 422, "invalid_request")
    with ThreadPoolExecutor(1) as callers:
        with narrow.holding(runs=1, slots=2, memory_mb=256):
            small = callers.submit(narrow.run, "print(1)")
            narrow.wait_for_metric("queued", 1)
        assert small.result()["usage"]["queue_s"] > 0


def test_a_run_dies_with_its_caller(narrow: Gateway) -> None:
    at_rest = narrow.footprint()
    with narrow.holding(runs=1, slots=1):
        assert narrow.run("print(1)")["stdout"] == "1\n"
    narrow.wait_idle(at_rest)


def test_a_waiting_request_leaves_the_queue_with_its_caller(narrow: Gateway) -> None:
    with narrow.holding(runs=2, slots=2):
        with narrow.waiting(code="1"):
            narrow.wait_for_metric("queued", 1)
        narrow.wait_for_metric("queued", 0)


def test_sigterm_lets_runs_finish_and_sends_the_queue_away() -> None:
    gateway = Gateway(slots=1, preload="[]")
    with ThreadPoolExecutor(3) as callers:
        running = callers.submit(gateway.run, "import time; time.sleep(4); print('done')", timeout_s=60)
        gateway.wait_for_metric("used_slots", 1)
        waiting = callers.submit(httpx.post, f"{gateway.url}/v1/execute", json={"code": "1"}, timeout=60)
        gateway.wait_for_metric("queued", 1)
        gateway.process.send_signal(signal.SIGTERM)
        refused = waiting.result(60)
        assert refused.headers["retry-after"]
        problem_of(refused, 503, "overloaded")
        assert running.result(60)["stdout"] == "done\n"
    assert gateway.process.wait(60) == 0
    gateway.stop()


def test_a_zygote_is_replaced_after_its_runs() -> None:
    gateway = Gateway(preload="[]", recycle_runs=30)
    try:
        first = {p.pid for p in gateway.descendants()}
        until_s = time.monotonic() + 90
        while (
            gateway.metric("singlestream_sandbox_zygote_starts_total") < 2
            or {p.pid for p in gateway.descendants()} & first
        ):
            assert gateway.run("print(1)")["stdout"] == "1\n"
            assert time.monotonic() < until_s
        assert 'reason="recycle"' in gateway.http.get("/metrics").text
    finally:
        assert gateway.stop() == 0


def test_a_missing_module_is_named_and_ends_the_gateway() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ended with 78.*no_such_module.*sandbox_gateway\.preload"):
        Gateway(preload='["numpy", "no_such_module"]')


def test_too_many_slots_for_the_memory_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ended with 78.*set sandbox_gateway\.slots to at most"):
        Gateway(slots=100_000)


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ended with 78.*sandbox_gateway\.slots"):
        Gateway(slots="many")
