"""Bounds on requests: how large a body may be, and how many requests a second one client may send."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.value_store.problems import problem

MAX_CLIENTS = 10_000
"""Clients whose rate is remembered; the one that was silent longest is forgotten first."""

UNBOUNDED_BODIES = ("/v1/import",)
"""Streamed; the route has a bound of its own."""
NOT_COUNTED = ("/healthz", "/readyz")
"""An orchestrator's probes must get through."""


class RateLimit:
    """A token bucket for each client; no clock inside.

    Args:
        per_s: requests a second, averaged.
        burst: requests that may come at once.
    """

    def __init__(self, per_s: float, burst: float) -> None:
        self.per_s, self.burst = per_s, max(1.0, burst)
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now_s: float) -> float:
        """Count a request; returns 0 where it may pass, else the seconds until one may."""
        tokens, then_s = self._clients.get(client, (self.burst, now_s))
        tokens = min(self.burst, tokens + (now_s - then_s) * self.per_s)
        wait_s = 0.0 if tokens >= 1.0 else (1.0 - tokens) / self.per_s
        self._clients[client] = (tokens - 1.0 if wait_s == 0.0 else tokens, now_s)
        self._clients.move_to_end(client)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        return wait_s


class Bounds:
    """ASGI middleware: 400 under a foreign name, 403 for a foreign page, 429 beyond the rate, 413 beyond the size.

    Args:
        app: the application inside.
        max_body_bytes: largest body.
        requests_per_s: of one client address; twice as many may come at once.
        hosts: names under which the service answers, and of the pages that may ask it; None: any.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, requests_per_s: float, hosts: Collection[str] | None) -> None:
        self.app, self.max_body_bytes, self.requests_per_s = app, max_body_bytes, requests_per_s
        self.hosts = hosts
        self.rate = RateLimit(requests_per_s, 2 * requests_per_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with a body that is counted as it is read."""
        if scope["type"] != "http" or scope["path"] in NOT_COUNTED:
            await self.app(scope, receive, send)
            return
        if self.hosts is not None and _hostname("//" + _header(scope, b"host")) not in self.hosts:
            await problem(400, "without a token this service answers under a loopback name only")(scope, receive, send)
            return
        if self.hosts is not None and _foreign_page(scope, self.hosts):
            detail = "without a token this service takes nothing from another site's page"
            await problem(403, detail)(scope, receive, send)
            return
        client = scope["client"][0] if scope.get("client") else ""
        wait_s = self.rate.take(client, time.monotonic())
        if wait_s > 0.0:
            detail = f"more than {self.requests_per_s:g} requests a second from {client or 'one client'}"
            reply = problem(429, detail, {"Retry-After": str(math.ceil(wait_s))})
            await reply(scope, receive, send)
            return
        if scope["path"] in UNBOUNDED_BODIES:
            await self.app(scope, receive, send)
            return
        too_large = f"the body is larger than the bound of {self.max_body_bytes} bytes"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_body_bytes:
            await problem(413, too_large)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, counted, send)


def _foreign_page(scope: Scope, hosts: Collection[str]) -> bool:
    """Whether a browser says that another site's page sends this: it may, to any address, though it reads no answer.

    A link from another site to the page here is no such thing: a GET without an origin, which changes nothing.
    """
    if origin := _header(scope, b"origin"):
        return _hostname(origin) not in hosts
    return scope["method"] not in ("GET", "HEAD") and _header(scope, b"sec-fetch-site") == "cross-site"


def _header(scope: Scope, name: bytes) -> str:
    return str(dict(scope["headers"]).get(name, b"").decode("latin-1"))


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
