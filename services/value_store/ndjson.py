"""NDJSON where a JSON array is asked for: one element a line."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

MEDIA_TYPE = "application/x-ndjson"


class NdjsonRoute(APIRoute):
    """A route that takes the elements of its JSON array one a line too; `max_request_bytes` bounds both."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind one that turns lines into an array."""
        handle = super().get_route_handler()

        async def handle_either(request: Request) -> Response:
            if request.headers.get("content-type", "").split(";")[0].strip().lower() == MEDIA_TYPE:
                request = _as_array(request, await request.body())
            return await handle(request)

        return handle_either


def _as_array(request: Request, body: bytes) -> Request:
    array = b"[" + b",".join(line for line in body.splitlines() if line.strip()) + b"]"

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": array, "more_body": False}

    headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
    return Request({**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}, receive)
