"""Client of the sandbox gateway: tells what a snippet did from what went wrong with the sandbox.

What a snippet did (an exception, a time-out, too much output) is an :class:`ExecuteResult`; :func:`observation` gives
the text that the model sees. What went wrong with the sandbox is a typed error and never evidence about the policy: the
lease goes back.

::

    SandboxError
    ├── SandboxRefused       the request is wrong or too large for this gateway (400, 413, 422), or the address is
    │                        no gateway's (404, 405): do not send it again
    ├── SandboxUnavailable   still failing at the deadline, after bounded retries; its cause is in the text
    └── IsolationUnavailable the gateway's host cannot isolate: no retry helps, an operator must act

Example::

    async with SandboxClient("http://127.0.0.1:8101") as sandbox:
        result = await sandbox.execute(ExecuteRequest(code="print(6 * 7)"), deadline_s=30)
        text = observation(result)
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from types import TracebackType

import httpx
from pydantic import ValidationError

from singlestream.contracts.sandbox import ExecuteRequest, ExecuteResult
from singlestream.errors import SandboxError

FIRST_BACKOFF_S = 0.1
"""Wait before the first retry; it doubles up to :data:`LONGEST_BACKOFF_S`."""
LONGEST_BACKOFF_S = 2.0
MAX_ATTEMPTS = 20
"""Requests sent at most, whatever the deadline: at the longest backoff this spans half a minute, longer than a
gateway's restart.
"""
CONNECT_TIMEOUT_S = 2.0
"""A gateway on the same network answers a connect in milliseconds."""
NO_RETRY_STATUSES = (400, 404, 405, 413, 422)
"""Answers about the request or its address: the same request gets the same answer.

None of them is about the code alone: 404 and 405 come from a wrong address, 422 from a gateway with tighter settings,
413 also from a proxy before it.
"""


class SandboxRefused(SandboxError):
    """The gateway refuses this request: too large, or not within its contract.

    Args:
        status: HTTP status.
        detail: the gateway's words.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"sandbox gateway refused the request ({status}): {detail}")
        self.status = status
        self.detail = detail


class SandboxUnavailable(SandboxError):
    """No outcome was to be had within the deadline.

    Args:
        attempts: requests sent.
        waited_s: seconds spent.
        last: what the last attempt met.
    """

    def __init__(self, attempts: int, waited_s: float, last: str) -> None:
        super().__init__(
            f"no outcome from the sandbox gateway after {attempts} attempts in {waited_s:.1f} s; last: {last}"
        )
        self.attempts = attempts
        self.last = last


class IsolationUnavailable(SandboxError):
    """The gateway's host cannot isolate code; `singlestream sandbox check` there says what it lacks."""


class _Fault(Exception):
    """One attempt failed and may be repeated.

    Args:
        kind: name for the counter.
        detail: what was met.
        retry_after_s: the gateway's advice in seconds; None if it gave none.
    """

    def __init__(self, kind: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.kind = kind
        self.retry_after_s = retry_after_s


class SandboxClient:
    """Runs snippets on a gateway. Safe for many coroutines at once; close it, or use it as a context manager.

    Args:
        base_url: of the gateway, for example ``http://127.0.0.1:8101``.
        max_connections: requests in flight at most; more wait for a connection within their deadline.
    """

    def __init__(self, base_url: str, max_connections: int = 256) -> None:
        # Transports of one connection each. They alone: cookies, redirects, proxies and authentication are of no use
        # here. One each: at every request httpx' own pool walks over all its connections, which at 64 of them costs
        # more than the run.
        self._transports: list[httpx.AsyncHTTPTransport] = []
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._free = asyncio.Semaphore(max_connections)
        self._tls = httpx.create_ssl_context()
        self._url = httpx.URL(base_url.rstrip("/") + "/v1/execute")
        self._headers = {"Host": self._url.netloc.decode(), "Content-Type": "application/json"}
        self.counts: Counter[str] = Counter()
        """What happened so far, by kind: the statuses of results (``ok``, ``error``, …), ``retry_<kind>`` for every
        repeated attempt, and ``refused``, ``unavailable``, ``isolation_unavailable`` for requests that raised. Many
        retries or raises mean a sick gateway.
        """

    async def __aenter__(self) -> SandboxClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        for transport in self._transports:
            await transport.aclose()

    async def execute(self, request: ExecuteRequest, deadline_s: float) -> ExecuteResult:
        """Run a snippet.

        A run that was lost with its gateway is run again, so a snippet may run more than once; it cannot leave anything
        behind.

        Args:
            request: what to run.
            deadline_s: seconds for everything: queueing, running, retries. Should exceed ``request.timeout_s``.

        Returns:
            How the snippet ended.

        Raises:
            SandboxRefused: the request is wrong; not retried.
            IsolationUnavailable: the gateway's host cannot isolate; not retried.
            SandboxUnavailable: the deadline passed, or :data:`MAX_ATTEMPTS` were made.
        """
        begun_s = time.monotonic()
        body = request.model_dump_json().encode()
        backoff_s = FIRST_BACKOFF_S
        last = "no answer"
        attempts = 0
        while attempts < MAX_ATTEMPTS and (left_s := deadline_s - (time.monotonic() - begun_s)) > 0:
            attempts += 1
            try:
                result = await self._attempt(body, left_s)
            except _Fault as fault:
                last = f"{fault.kind}: {fault}"
                # Jitter, so that the callers of a restarted gateway do not come back all at once.
                wait_s = max(backoff_s * random.uniform(0.5, 1.0), fault.retry_after_s or 0.0)  # noqa: S311  not for security
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                if attempts == MAX_ATTEMPTS or time.monotonic() - begun_s + wait_s >= deadline_s:
                    break
                self.counts[f"retry_{fault.kind}"] += 1
                await asyncio.sleep(wait_s)
            else:
                self.counts[result.status] += 1
                return result
        self.counts["unavailable"] += 1
        raise SandboxUnavailable(attempts, time.monotonic() - begun_s, last)

    async def _attempt(self, body: bytes, left_s: float) -> ExecuteResult:
        timeout = {"connect": min(left_s, CONNECT_TIMEOUT_S), "read": left_s, "write": left_s, "pool": left_s}
        request = httpx.Request("POST", self._url, headers=self._headers, content=body, extensions={"timeout": timeout})
        try:
            async with asyncio.timeout(left_s), self._free:
                response = await self._send(request)
        except TimeoutError:
            raise _Fault("deadline", f"no answer within {left_s:.1f} s") from None
        except httpx.TransportError as error:
            raise _Fault("transport", f"{type(error).__name__}: {error}") from error
        if response.status_code == 200:
            try:
                return ExecuteResult.model_validate_json(response.content)
            except ValidationError as error:
                raise _Fault(
                    "bad_answer", f"the answer does not keep its contract: {error.error_count()} problems"
                ) from error
        raise self._failure(response)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        """The whole answer, over a connection that nobody else uses meanwhile; the one used last is the warmest."""
        if not self._idle:
            self._idle.append(httpx.AsyncHTTPTransport(verify=self._tls, limits=httpx.Limits(max_connections=1)))
            self._transports.append(self._idle[-1])
        transport = self._idle.pop()
        try:
            response = await transport.handle_async_request(request)
            await response.aread()
            await response.aclose()
            return response
        finally:
            self._idle.append(transport)

    def _failure(self, response: httpx.Response) -> Exception:
        """The exception that an error response stands for."""
        try:
            problem = response.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            problem = {}
        problem = problem if isinstance(problem, dict) else {}
        code, detail = str(problem.get("code", response.status_code)), str(problem.get("detail", response.text[:200]))
        if response.status_code in NO_RETRY_STATUSES:
            self.counts["refused"] += 1
            return SandboxRefused(response.status_code, detail)
        if code == "isolation_unavailable":
            self.counts["isolation_unavailable"] += 1
            return IsolationUnavailable(detail)
        return _Fault(code, detail, _seconds(response.headers.get("Retry-After")))


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; None if absent or a date."""
    return float(text) if text is not None and text.isdigit() else None


def observation(result: ExecuteResult) -> str:
    """The text that the model sees for an outcome: what was printed, then how it ended if not well.

    Standard error is shown where the snippet failed (it holds the traceback) or printed nothing else.
    """
    parts = [result.stdout.rstrip("\n")]
    failed = result.status != "ok"
    if failed or not result.stdout:
        parts.append(result.stderr.rstrip("\n"))
    if failed:
        parts.append(_ending(result))
    return "\n".join(part for part in parts if part)


def _ending(result: ExecuteResult) -> str:
    """How a failed run ended, where its own output does not say so already."""
    if result.status == "timeout":
        return f"TimeoutError: the code did not finish within {result.usage.wall_s:.0f} s and was stopped"
    if result.status == "output_limit":
        return "OutputLimitError: the code printed too much and was stopped"
    if result.status == "killed":
        return f"The code was ended by signal {result.signal}"
    if result.error is not None and result.error.type not in result.stderr:
        return f"{result.error.type}: {result.error.message}"
    if result.error is None and not result.stderr:
        return f"The code exited with code {result.exit_code}"
    return ""
