"""The client against a server that misbehaves on purpose, and its text for the model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from singlestream.clients import sandbox
from singlestream.clients.sandbox import (
    IsolationUnavailable,
    SandboxClient,
    SandboxRefused,
    SandboxUnavailable,
    observation,
)
from singlestream.contracts.sandbox import ErrorReport, ExecuteRequest, ExecuteResult, Usage
from singlestream.errors import SandboxError

REQUEST = ExecuteRequest(code="print(1)")
Reply = tuple[int, dict[str, str], str] | None


def result(**changes: Any) -> ExecuteResult:
    values: dict[str, Any] = {
        "status": "ok", "exit_code": 0, "signal": None, "stdout": "1\n", "stderr": "", "stdout_truncated": False,
        "stderr_truncated": False, "stdout_bytes": 2, "stderr_bytes": 0, "error": None,
        "usage": Usage(wall_s=2.0, cpu_s=0.1, max_rss_mb=9.0, queue_s=0.0), "policy_version": "0" * 12,
    }  # fmt: skip
    return ExecuteResult(**{**values, **changes})


OK: Reply = (200, {}, result().model_dump_json())


def problem(status: int, code: str, **headers: str) -> Reply:
    return (
        status,
        headers,
        json.dumps({"type": "urn:x", "title": "t", "status": status, "code": code, "detail": "the detail"}),
    )


class Script:
    """An HTTP server that gives the next answer of a list, and hangs up where it is None."""

    def __init__(self, answers: list[Reply], delay_s: float = 0.0) -> None:
        self.answers = answers
        self.delay_s = delay_s
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await asyncio.sleep(self.delay_s)
                answer = self.answers.pop(0)
                if answer is None:
                    break
                status, headers, body = answer
                lines = [
                    f"HTTP/1.1 {status} x",
                    f"Content-Length: {len(body.encode())}",
                    *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
                ]
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body.encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def scripted() -> AsyncIterator[Callable[..., Any]]:
    servers = []

    async def start(*answers: Reply, delay_s: float = 0.0) -> Script:
        script = Script(list(answers), delay_s)
        server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
        servers.append(server)
        script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return script

    yield start
    for server in servers:
        server.close()


async def test_outcome(scripted: Any) -> None:
    script = await scripted(OK)
    async with SandboxClient(script.url) as client:
        assert await client.execute(ExecuteRequest(code="print(1)", seed=3), deadline_s=10) == result()
        assert client.counts == {"ok": 1}
    assert script.bodies == [ExecuteRequest(code="print(1)", seed=3).model_dump()]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (problem(500, "sandbox_error"), "sandbox_error"),
        (problem(503, "overloaded"), "overloaded"),
        (problem(504, "queue_timeout"), "queue_timeout"),
        ((502, {}, "<html>bad gateway"), "502"),
        ((200, {}, '{"status": "ok"}'), "bad_answer"),
        ((200, {}, "not json"), "bad_answer"),
        (None, "transport"),
    ],
)
async def test_faults_of_the_infrastructure_are_retried(scripted: Any, fault: Reply, kind: str) -> None:
    script = await scripted(fault, fault, OK)
    async with SandboxClient(script.url) as client:
        assert (await client.execute(REQUEST, deadline_s=30)).status == "ok"
        assert client.counts == {f"retry_{kind}": 2, "ok": 1}


@pytest.mark.parametrize(("status", "code"), [(413, "too_large"), (422, "invalid_request"), (404, "not_found")])
async def test_refused_requests_are_not_retried(scripted: Any, status: int, code: str) -> None:
    script = await scripted(problem(status, code), OK)
    async with SandboxClient(script.url) as client:
        with pytest.raises(SandboxRefused, match="the detail") as caught:
            await client.execute(REQUEST, deadline_s=10)
        assert client.counts == {"refused": 1}
    assert caught.value.status == status
    assert len(script.bodies) == 1


async def test_missing_isolation_is_not_retried(scripted: Any) -> None:
    script = await scripted(problem(503, "isolation_unavailable"), OK)
    async with SandboxClient(script.url) as client:
        with pytest.raises(IsolationUnavailable, match="the detail"):
            await client.execute(REQUEST, deadline_s=10)
        assert client.counts == {"isolation_unavailable": 1}
    assert len(script.bodies) == 1


async def test_retry_after_is_kept(scripted: Any) -> None:
    script = await scripted(problem(429, "overloaded", retry_after="1"), OK)
    begun_s = time.monotonic()
    async with SandboxClient(script.url) as client:
        await client.execute(REQUEST, deadline_s=30)
    assert time.monotonic() - begun_s >= 1.0


async def test_retry_after_beyond_the_deadline_ends_at_once(scripted: Any) -> None:
    script = await scripted(problem(429, "overloaded", retry_after="30"), OK)
    async with SandboxClient(script.url) as client:
        with pytest.raises(SandboxUnavailable, match=r"1 attempts.*overloaded: the detail"):
            await client.execute(REQUEST, deadline_s=20)
        assert client.counts == {"unavailable": 1}


async def test_deadline_covers_everything(scripted: Any) -> None:
    script = await scripted(OK, delay_s=60)
    begun_s = time.monotonic()
    async with SandboxClient(script.url) as client:
        with pytest.raises(SandboxUnavailable, match="deadline: no answer within"):
            await client.execute(REQUEST, deadline_s=0.3)
    assert 0.25 < time.monotonic() - begun_s < 30


async def test_an_attempt_that_was_not_made_is_not_counted(scripted: Any) -> None:
    script = await scripted(OK)
    async with SandboxClient(script.url) as client:
        with pytest.raises(SandboxUnavailable) as caught:
            await client.execute(REQUEST, deadline_s=0.0)
    assert caught.value.attempts == len(script.bodies) == 0


async def test_attempts_are_bounded(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "FIRST_BACKOFF_S", 0.0)
    monkeypatch.setattr(sandbox, "LONGEST_BACKOFF_S", 0.0)
    script = await scripted(*[problem(500, "sandbox_error")] * 100)
    async with SandboxClient(script.url) as client:
        with pytest.raises(SandboxUnavailable) as caught:
            await client.execute(REQUEST, deadline_s=1000)
    assert caught.value.attempts == len(script.bodies) == sandbox.MAX_ATTEMPTS


async def test_absent_gateway() -> None:
    async with SandboxClient("http://127.0.0.1:9") as client:
        with pytest.raises(SandboxUnavailable, match="ConnectError"):
            await client.execute(REQUEST, deadline_s=0.5)


def test_errors_have_one_base() -> None:
    assert all(issubclass(kind, SandboxError) for kind in (SandboxRefused, SandboxUnavailable, IsolationUnavailable))


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (result(), "1"),
        (result(stdout="a\nb\n\n"), "a\nb"),
        (result(stdout="1\n", stderr="warning\n"), "1"),
        (result(stdout="", stderr="warning\n"), "warning"),
        (result(stdout=""), ""),
        (
            result(
                status="error",
                exit_code=1,
                stderr="Traceback\nValueError: v\n",
                error=ErrorReport(type="ValueError", message="v"),
            ),
            "1\nTraceback\nValueError: v",
        ),
        (result(status="error", exit_code=3, error=ErrorReport(type="SystemExit", message="3")), "1\nSystemExit: 3"),
        (result(status="error", exit_code=3), "1\nThe code exited with code 3"),
        (
            result(status="timeout", exit_code=None, signal=9),
            "1\nTimeoutError: the code did not finish within 2 s and was stopped",
        ),
        (
            result(status="output_limit", exit_code=None, signal=9),
            "1\nOutputLimitError: the code printed too much and was stopped",
        ),
        (result(status="killed", exit_code=None, signal=11, stdout=""), "The code was ended by signal 11"),
        (
            result(
                status="memory_limit",
                exit_code=1,
                stdout="",
                stderr="MemoryError\n",
                error=ErrorReport(type="MemoryError", message=""),
            ),
            "MemoryError",
        ),
    ],
)
def test_observation(outcome: ExecuteResult, text: str) -> None:
    assert observation(outcome) == text
