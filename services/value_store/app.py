"""The REST application: routes, tokens, bounds, and errors by RFC 9457."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.exceptions import HTTPException

from services.value_store import routes_exchange, routes_jobs, routes_page, routes_prompts, routes_run
from services.value_store.bounds import Bounds
from services.value_store.examples import EXAMPLES
from services.value_store.problems import problem, problem_docs
from services.value_store.prompts import Refused
from services.value_store.schemas import Problem
from services.value_store.store import NotReady, Store
from singlestream.config import LOOPBACK, ValueStoreConfig
from singlestream.errors import ConfigError, Fenced
from singlestream.streams.connection import LOST

log = logging.getLogger(__name__)

BEARER = HTTPBearer(auto_error=False, description="The read or the write token; none is asked for on loopback.")


def check_exposure(settings: ValueStoreConfig) -> None:
    """Refuse to listen off loopback without both tokens, and to guard reading but not writing. Raises `ConfigError`."""
    if settings.host not in LOOPBACK and not (settings.read_token and settings.write_token):
        raise ConfigError(
            f"value_store.host is {settings.host}: off loopback, value_store.read_token and value_store.write_token "
            "must be set (SINGLESTREAM_VALUE_STORE__READ_TOKEN, SINGLESTREAM_VALUE_STORE__WRITE_TOKEN)"
        )
    if settings.read_token and not settings.write_token:
        raise ConfigError("value_store.read_token is set and value_store.write_token is not: anyone could write")


def require(*tokens: SecretStr | None) -> Callable[..., Awaitable[None]]:
    """A dependency that lets pass who shows one of the tokens; where the first is None, anyone.

    Asynchronous, like every dependency here: a plain function would cost each request a hop to a thread.
    """

    async def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
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
        generate_unique_id_function=lambda route: route.name,
        responses=problem_docs(400, 401, 403, 413, 422, 429, 503),
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.store = store
    read, write = settings.read_token, settings.write_token
    reading, writing = [Depends(require(read, write))], [Depends(require(write))]
    app.include_router(routes_run.health)
    for module in (routes_prompts, routes_jobs, routes_run, routes_exchange):
        app.include_router(module.reads, dependencies=reading)
        app.include_router(module.writes, dependencies=writing)
    app.include_router(routes_page.reads, dependencies=reading)
    app.include_router(routes_page.page)
    app.mount("/page", routes_page.static, name="page")
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    _handle_errors(app)
    # Without a token, a web page must not get through: by a name of its own for 127.0.0.1, or by sending blindly.
    open_to_loopback = settings.read_token is None and settings.host in LOOPBACK
    app.add_middleware(
        Bounds,
        max_body_bytes=settings.max_request_bytes,
        requests_per_s=settings.max_requests_per_s,
        hosts=LOOPBACK if open_to_loopback else None,
    )
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, with an example of each body and the schema of errors that all answers share."""
    if not app.openapi_schema:
        document = FastAPI.openapi(app)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas["Problem"] = Problem.model_json_schema()
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for name, example in EXAMPLES.items():
            schemas[name]["examples"] = [example]
    return app.openapi_schema or {}


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

    @app.exception_handler(Fenced)
    def fenced(_: Request, error: Fenced) -> JSONResponse:
        return problem(503, str(error), {"Retry-After": "1"})

    async def lost(request: Request, error: Exception) -> JSONResponse:
        return problem(503, f"Redis is away: {error}", {"Retry-After": "1"})

    for kind in LOST:
        if kind is not OSError:  # redis-py has one of its own for every error of a socket; others are not Redis'
            app.add_exception_handler(kind, lost)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        log.exception("a request failed", exc_info=error)
        return problem(500, "the value store failed on this request; its log says why")
