"""The REST application: routes, tokens, bounds, and errors by RFC 9457."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from services.value_store import routes_jobs, routes_prompts, routes_run
from services.value_store.prompts import Refused
from services.value_store.schemas import Problem
from services.value_store.store import NotReady, Store
from singlestream.config import LOOPBACK, ValueStoreConfig
from singlestream.errors import ConfigError, Fenced
from singlestream.streams.connection import LOST

log = logging.getLogger(__name__)

BEARER = HTTPBearer(auto_error=False, description="The read or the write token; none is asked for on loopback.")
PROBLEM_JSON = "application/problem+json"
TITLES = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    411: "Length required",
    413: "Content too large",
    422: "Unprocessable content",
    429: "Too many requests",
    500: "Internal error",
    503: "Not ready",
}


def check_exposure(settings: ValueStoreConfig) -> None:
    """Refuse to listen off loopback without both tokens. Raises `ConfigError`."""
    if settings.host not in LOOPBACK and not (settings.read_token and settings.write_token):
        raise ConfigError(
            f"value_store.host is {settings.host}: off loopback, value_store.read_token and value_store.write_token "
            "must be set (SINGLESTREAM_VALUE_STORE__READ_TOKEN, SINGLESTREAM_VALUE_STORE__WRITE_TOKEN)"
        )


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error body by RFC 9457."""
    body = Problem(title=TITLES.get(status, "Error"), status=status, detail=detail).model_dump()
    return JSONResponse(body, status, headers, media_type=PROBLEM_JSON)


def _problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": TITLES[status], "content": content} for status in statuses}


def require(*tokens: SecretStr | None) -> Callable[..., None]:
    """A dependency that lets pass who shows one of the tokens; where the first is None, anyone."""

    def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        if tokens[0] is None:
            return
        shown = credentials.credentials.encode() if credentials else b""
        if not any(token and hmac.compare_digest(shown, token.get_secret_value().encode()) for token in tokens):
            status = 403 if credentials else 401
            raise HTTPException(status, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    return check


def make_app(store: Store, settings: ValueStoreConfig) -> FastAPI:
    """Build the application around a store. Raises `ConfigError` where it would be exposed without tokens."""
    check_exposure(settings)
    app = FastAPI(
        title="Singlestream value store",
        version="1",
        summary="Posteriors of prompts, the leases drawn from them, and the run's state.",
        responses=_problem_docs(401, 403, 422, 429, 503),
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.store = store
    read, write = settings.read_token, settings.write_token
    reading, writing = [Depends(require(read, write))], [Depends(require(write))]
    app.include_router(routes_run.health)
    for module in (routes_prompts, routes_jobs, routes_run):
        app.include_router(module.reads, dependencies=reading)
        app.include_router(module.writes, dependencies=writing)
    _handle_errors(app)
    if settings.write_token is None and settings.host in LOOPBACK:
        # Without a token, a web page that points its own name at 127.0.0.1 must not get through.
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1", "testserver"]
        )
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:20]]
        return problem(422, "; ".join(found))

    @app.exception_handler(Refused)
    def refused(_: Request, error: Refused) -> JSONResponse:
        return problem(409, str(error))

    @app.exception_handler(NotReady)
    def not_ready(_: Request, error: NotReady) -> JSONResponse:
        return problem(503, str(error), {"Retry-After": "1"})

    async def lost(request: Request, error: Exception) -> JSONResponse:
        return problem(503, f"Redis is away: {error}", {"Retry-After": "1"})

    for kind in (*LOST, Fenced):
        app.add_exception_handler(kind, lost)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        log.exception("a request failed", exc_info=error)
        return problem(500, "the value store failed on this request; its log says why")
