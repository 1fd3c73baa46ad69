"""Error bodies after RFC 9457 (``application/problem+json``).

Each is a fault of the infrastructure or of the request, never a snippet's.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

ProblemCode = Literal[
    "invalid_request",
    "request_timeout",
    "too_large",
    "overloaded",
    "isolation_unavailable",
    "queue_timeout",
    "sandbox_error",
    "not_found",
    "method_not_allowed",
]

TITLES: dict[ProblemCode, str] = {
    "invalid_request": "The request does not keep its contract",
    "request_timeout": "The request did not arrive in time",
    "too_large": "The code or its input is too large",
    "overloaded": "The gateway takes no more requests at the moment",
    "isolation_unavailable": "This host cannot isolate code, so nothing is run",
    "queue_timeout": "No slot became free in time",
    "sandbox_error": "The sandbox failed; the snippet has no outcome",
    "not_found": "There is nothing here",
    "method_not_allowed": "This resource has no such method",
}


class ProblemBody(BaseModel):
    """An error body."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """URN of the kind of problem, ``urn:singlestream:sandbox:<code>``."""
    title: str
    """What this kind of problem is."""
    status: int
    """The HTTP status, again."""
    detail: str
    """What happened this time, and what to do."""
    code: ProblemCode
    """The kind, for programs."""
    request_id: str | None = None
    """The request's id. None if the request had none that could be read."""
    retry_after_s: int | None = None
    """Whole seconds to wait before trying again. None: no advice (retry at will where ``code`` is sandbox_error), or do
    not retry.
    """


class Problem(Exception):
    """Raised where a request ends without an outcome.

    Args:
        status: HTTP status.
        code: kind of problem.
        detail: what happened and what to do.
        retry_after_s: seconds after which a retry may succeed; None if no time can be named.
    """

    def __init__(self, status: int, code: ProblemCode, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code: ProblemCode = code
        self.detail = detail
        self.retry_after_s = None if retry_after_s is None else max(1, math.ceil(retry_after_s))

    def response(self, request_id: str | None = None) -> JSONResponse:
        """The HTTP response."""
        body = ProblemBody(
            type=f"urn:singlestream:sandbox:{self.code}",
            title=TITLES[self.code],
            status=self.status,
            detail=self.detail,
            code=self.code,
            request_id=request_id,
            retry_after_s=self.retry_after_s,
        )
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.code == "request_timeout":  # the rest of the body is not waited for
            headers["Connection"] = "close"
        content: dict[str, Any] = body.model_dump(mode="json", exclude_none=True)
        return JSONResponse(content, self.status, headers, media_type="application/problem+json")
