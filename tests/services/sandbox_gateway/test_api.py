"""The HTTP interface: outcomes, refusals, overload, disconnection, draining."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from singlestream.contracts.sandbox import ExecuteResult
from tests.services.sandbox_gateway.gateway import Gateway


def problem_of(answer: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, object] = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert {"type", "title", "detail"} <= set(body)
    return body


@pytest.fixture(scope="module")
def narrow() -> Iterator[Gateway]:
    """Two slots, a queue of two, and little patience."""
    started = Gateway(slots=2, queue_per_slot=1, queue_timeout_s=1, preload="[]", memory_mb=128)
    yield started
    assert started.stop() == 0


def wait_for_metric(gateway: Gateway, name: str, value: float) -> None:
    until_s = time.monotonic() + 20
    while gateway.metric(f"singlestream_sandbox_{name}") != value:
        assert time.monotonic() < until_s, f"{name} is {gateway.metric(f'singlestream_sandbox_{name}')}"
        time.sleep(0.01)


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
    result = gateway.run("print('no newline', end='')\nwhile True: pass", timeout_s=0.5)
    assert (result["status"], result["signal"], result["stdout"]) == ("timeout", 9, "no newline")
    assert result["usage"]["wall_s"] >= 0.5


def test_long_output_keeps_head_and_tail(gateway: Gateway) -> None:
    result = gateway.run("print('a' * 100_000 + 'z' * 100_000)", max_output_bytes=1000)
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


def test_unknown_paths_and_methods(gateway: Gateway) -> None:
    problem_of(gateway.http.get("/v2"), 404, "not_found")
    problem_of(gateway.http.get("/v1/execute"), 405, "method_not_allowed")


def test_openapi_documents_requests_results_and_problems(gateway: Gateway) -> None:
    document = gateway.http.get("/openapi.json").json()
    operation = document["paths"]["/v1/execute"]["post"]
    assert set(operation["responses"]) == {"200", "413", "422", "429", "500", "503", "504"}
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
    def post(_: int) -> httpx.Response:
        return httpx.post(f"{narrow.url}/v1/execute", json={"code": "import time; time.sleep(3)"}, timeout=60)

    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(post, range(8)))
    by_status = {status: [a for a in answers if a.status_code == status] for status in (200, 429, 504)}
    assert {status: len(found) for status, found in by_status.items()} == {200: 2, 429: 4, 504: 2}
    for answer in by_status[429]:
        assert problem_of(answer, 429, "overloaded")["retry_after_s"] == int(answer.headers["retry-after"]) >= 1
    for answer in by_status[504]:
        problem_of(answer, 504, "queue_timeout")
    assert narrow.run("print(1)")["stdout"] == "1\n"


def test_memory_takes_slots(narrow: Gateway) -> None:
    """256 MiB are both slots of 128: beside it nothing else runs."""
    problem_of(narrow.http.post("/v1/execute", json={"code": "1", "memory_mb": 300}), 422, "invalid_request")
    large = threading.Thread(target=narrow.run, args=("import time; time.sleep(0.5)",), kwargs={"memory_mb": 256})
    large.start()
    wait_for_metric(narrow, "used_slots", 2)
    small = narrow.run("print(1)")
    large.join()
    assert small["usage"]["queue_s"] > 0


def test_a_run_dies_with_its_caller(narrow: Gateway) -> None:
    at_rest = narrow.footprint()
    body = json.dumps({"code": "import time; time.sleep(60)", "timeout_s": 60}).encode()
    with socket.create_connection(("127.0.0.1", narrow.port)) as caller:
        caller.sendall(b"POST /v1/execute HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for_metric(narrow, "used_slots", 1)
    wait_for_metric(narrow, "used_slots", 0)
    narrow.wait_idle(at_rest)


def test_a_waiting_request_leaves_the_queue_with_its_caller(narrow: Gateway) -> None:
    running = [threading.Thread(target=narrow.run, args=("import time; time.sleep(0.8)",)) for _ in range(2)]
    for thread in running:
        thread.start()
    wait_for_metric(narrow, "used_slots", 2)
    body = json.dumps({"code": "1"}).encode()
    with socket.create_connection(("127.0.0.1", narrow.port)) as caller:
        caller.sendall(b"POST /v1/execute HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for_metric(narrow, "queued", 1)
    wait_for_metric(narrow, "queued", 0)
    for thread in running:
        thread.join()


def test_sigterm_lets_runs_finish_and_sends_the_queue_away() -> None:
    gateway = Gateway(slots=1, preload="[]")
    with ThreadPoolExecutor(3) as callers:
        running = callers.submit(gateway.run, "import time; time.sleep(1.5); print('done')")
        wait_for_metric(gateway, "used_slots", 1)
        waiting = callers.submit(httpx.post, f"{gateway.url}/v1/execute", json={"code": "1"}, timeout=60)
        wait_for_metric(gateway, "queued", 1)
        gateway.process.send_signal(signal.SIGTERM)
        refused = waiting.result(30)
        assert refused.headers["retry-after"]
        problem_of(refused, 503, "overloaded")
        assert running.result(30)["stdout"] == "done\n"
    assert gateway.process.wait(30) == 0
    gateway.stop()


def test_a_zygote_is_replaced_after_its_runs() -> None:
    gateway = Gateway(preload="[]", recycle_runs=30)
    try:
        first = {p.pid for p in gateway.descendants()}
        until_s = time.monotonic() + 30
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
