"""Error bodies by RFC 9457."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from services.value_store.examples import DETAILS
from services.value_store.schemas import Problem

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


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error body by RFC 9457."""
    return JSONResponse(_body(status, detail), status, headers, media_type=PROBLEM_JSON)


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an OpenAPI document says of those statuses."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": TITLES[status],
            "content": {PROBLEM_JSON: {"schema": schema, "example": _body(status, DETAILS[status])}},
        }
        for status in statuses
    }


def _body(status: int, detail: str) -> dict[str, Any]:
    return Problem(title=TITLES.get(status, "Error"), status=status, detail=detail).model_dump()
