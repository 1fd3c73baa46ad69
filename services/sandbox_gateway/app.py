"""The HTTP interface."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from services.sandbox_gateway.problems import Problem, ProblemBody
from services.sandbox_gateway.service import SandboxService
from singlestream.contracts.sandbox import MAX_CODE_BYTES, MAX_STDIN_BYTES, ExecuteRequest, ExecuteResult

log = logging.getLogger("singlestream.sandbox")

MAX_BODY_BYTES = 6 * (MAX_CODE_BYTES + MAX_STDIN_BYTES) + 65_536
"""JSON spends at most six bytes on a byte of text."""

BODY_DEADLINE_S = 30.0
"""A caller on the same network sends the largest body in a second; one that stalls would hold it in memory for ever."""

_REQUEST_EXAMPLES = {
    "print": {"summary": "A program", "value": {"code": "print(6 * 7)", "timeout_s": 5}},
    "expression": {
        "summary": "The value of the last expression",
        "value": {"code": "x = 6\nx * 7", "echo_last_expr": True},
    },
}
_PROBLEMS = {
    408: "`request_timeout`: the body did not arrive in time. Retry.",
    413: "`too_large`: code over 256 KiB or stdin over 1 MiB. Do not retry.",
    422: "`invalid_request`: the body does not keep its contract. Do not retry.",
    429: "`overloaded`: the queue is full. Retry after `Retry-After` seconds.",
    500: "`sandbox_error`: the sandbox failed; the snippet has no outcome. Retry.",
    503: "`overloaded`: starting or stopping, retry after `Retry-After`; `isolation_unavailable`: do not retry.",
    504: "`queue_timeout`: no slot became free in time. Retry.",
}


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of error responses."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {status: {"description": _PROBLEMS[status], "model": ProblemBody, "content": content} for status in statuses}


def create_app(service: SandboxService) -> FastAPI:
    """The application around a started service."""
    app = FastAPI(
        title="Singlestream sandbox gateway",
        version="1",
        description="Runs model-written Python in a jail of its own. 200 is an outcome of the snippet; anything else "
        "is a fault of the infrastructure or of the request, and never evidence about the snippet.",
    )
    _add_execute(app, service)
    _add_operations(app, service)
    _add_problems(app, service)
    return app


def _add_problems(app: FastAPI, service: SandboxService) -> None:
    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        service.metrics.faults.labels("disconnected" if problem.status == 499 else problem.code).inc()
        request_id = getattr(request.state, "request_id", None)
        if problem.status >= 500:
            log.warning("request %s: %s: %s", request_id, problem.code, problem.detail)
        return problem.response(request_id)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        known = {404: "not_found", 405: "method_not_allowed"}
        code = known.get(error.status_code, "invalid_request")
        return Problem(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}").response()  # type: ignore[arg-type]

    @app.exception_handler(Exception)
    async def on_defect(request: Request, error: Exception) -> Response:
        service.metrics.faults.labels("sandbox_error").inc()
        detail = f"the gateway has a defect: {type(error).__name__}; its log has more"
        return Problem(500, "sandbox_error", detail).response(getattr(request.state, "request_id", None))


def _add_execute(app: FastAPI, service: SandboxService) -> None:
    @app.post(
        "/v1/execute",
        summary="Run a snippet",
        description="Runs `code` in a fresh jail and returns how it ended, with whatever it printed.",
        response_model=ExecuteResult,
        responses=problem_docs(*_PROBLEMS),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": ExecuteRequest.model_json_schema(), "examples": _REQUEST_EXAMPLES}
                },
            }
        },
    )
    async def execute(request: Request) -> Response:
        order = _parse(await _read_body(request))
        request.state.request_id = order.request_id or secrets.token_hex(8)
        disconnected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watcher = asyncio.create_task(_watch(request, disconnected))
        try:
            result = await service.execute(order, disconnected)
        finally:
            watcher.cancel()
        headers = {"X-Request-Id": request.state.request_id.encode("ascii", "replace").decode()}
        return Response(result.model_dump_json(), media_type="application/json", headers=headers)


def _add_operations(app: FastAPI, service: SandboxService) -> None:
    @app.get(
        "/healthz",
        summary="Whether the process lives",
        responses={200: {"content": {"application/json": {"example": {"status": "ok"}}}}},
    )
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        summary="Whether requests are taken",
        description="503 while no zygote is ready, and while draining. `zygotes` has each kind's state.",
        responses={
            200: {"content": {"application/json": {"example": {"status": "ready", "zygotes": {"plain": "ready"}}}}},
            **problem_docs(503),
        },
    )
    async def readyz() -> dict[str, Any]:
        if (problem := service.not_ready()) is not None:
            raise problem
        return {"status": "ready", "zygotes": service.pool.states}

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _read_body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = Problem(413, "too_large", f"the body may have {MAX_BODY_BYTES} bytes")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise Problem(408, "request_timeout", f"the body was not here after {BODY_DEADLINE_S:.0f} s") from None
    return bytes(body)


def _parse(body: bytes) -> ExecuteRequest:
    try:
        return ExecuteRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        text = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems[:10])
        raise Problem(422, "invalid_request", text) from error


async def _watch(request: Request, disconnected: asyncio.Future[None]) -> None:
    """Tell when the caller hangs up."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if not disconnected.done():
            disconnected.set_result(None)
