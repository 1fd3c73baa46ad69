"""The learner's weight files over HTTP, for replicas on other machines: whole, in ranges, and as deltas.

``GET /weights/<name>`` with ``ETag``, ``Range`` (one range), ``If-Range``, ``If-Match`` and ``If-None-Match``
(RFC 9110). The kernel sends from the memory volume's own pages, so a transfer takes no memory here. A file that newer
versions replaced while it is being sent is sent to its end; asked for again it is gone (404).
"""

from __future__ import annotations

import hmac
import os
import re
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from singlestream.config import LOOPBACK, Config
from singlestream.errors import ConfigError

PREFIX = "/weights/"
MOST_TRANSFERS = 16
"""Transfers at a time; beyond that 503 with Retry-After. One a node is what replicas ask for."""
RETRY_AFTER_S = 1
STALL_S = 60.0
"""A client that takes nothing for so long is dropped."""
PART_BYTES = 16 * 2**20
"""Bytes of one call to the kernel: `STALL_S` counts from one to the next."""
_RANGE = re.compile(r"^bytes=(\d+)-(\d*)$")


class WeightFiles:
    """What may be fetched now, under which entity tag.

    Args:
        token: bearer token that is asked for; None asks for none.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._files: dict[str, tuple[Path, str]] = {}
        self.transfers = threading.BoundedSemaphore(MOST_TRANSFERS)

    @classmethod
    def of(cls, config: Config) -> WeightFiles | None:
        """As the settings ask for; None where weights travel through the memory volume alone.

        Raises:
            ConfigError: it would serve weights off loopback without a token.
        """
        if config.learner.weights_url is None:
            return None
        if config.learner.metrics_host not in LOOPBACK and config.run.weights_token is None:
            raise ConfigError(
                f"learner.metrics_host is {config.learner.metrics_host} and learner.weights_url is set: off loopback, "
                "run.weights_token must be set"
            )
        token = config.run.weights_token
        return cls(None if token is None else token.get_secret_value())

    def offer(self, files: dict[str, tuple[Path, str]]) -> None:
        """Replace what is offered: name → (path, entity tag)."""
        self._files = dict(files)

    def find(self, name: str) -> tuple[Path, str] | None:
        """Path and entity tag of a file; None if it is not offered."""
        return self._files.get(name)

    def admits(self, authorization: str) -> bool:
        """Whether a request with this header may fetch."""
        told = authorization.removeprefix("Bearer ").encode()
        return self._token is None or hmac.compare_digest(told, self._token.encode())


def requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """``[start, end)`` of a ``Range`` header; the whole file without one, or for what this server does not know.

    Returns:
        None where the range begins beyond the end (416).
    """
    match = _RANGE.match(header or "")
    if match is None:
        return 0, size
    start, last = int(match[1]), int(match[2]) if match[2] else size - 1
    if start >= size or last < start:
        return None
    return start, min(last + 1, size)


def answer(request: BaseHTTPRequestHandler, files: WeightFiles) -> None:
    """Answer ``GET`` or ``HEAD`` of one file."""
    if not files.admits(request.headers.get("Authorization", "")):
        return _refuse(request, 401, {"WWW-Authenticate": "Bearer"})
    found = files.find(request.path.removeprefix(PREFIX))
    if found is None:
        return _refuse(request, 404)
    path, etag = found
    if request.headers.get("If-Match", etag) not in (etag, "*"):
        return _refuse(request, 412, {"ETag": etag})
    if request.headers.get("If-None-Match") == etag:
        return _refuse(request, 304, {"ETag": etag})
    if not files.transfers.acquire(blocking=False):
        return _refuse(request, 503, {"Retry-After": str(RETRY_AFTER_S)})
    try:
        with path.open("rb") as file:
            _send(request, file.fileno(), etag)
    except FileNotFoundError:
        _refuse(request, 404)
    except (ConnectionError, TimeoutError):
        request.close_connection = True
    finally:
        files.transfers.release()


def _refuse(request: BaseHTTPRequestHandler, code: int, headers: dict[str, str] | None = None) -> None:
    request.send_response(code)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", "0")
    request.end_headers()


def _send(request: BaseHTTPRequestHandler, descriptor: int, etag: str) -> None:
    size = os.fstat(descriptor).st_size
    wanted = request.headers.get("Range") if request.headers.get("If-Range", etag) == etag else None
    span = requested_range(wanted, size)
    if span is None:
        return _refuse(request, 416, {"Content-Range": f"bytes */{size}"})
    start, end = span
    partial = end - start < size
    request.send_response(206 if partial else 200)
    request.send_header("Content-Type", "application/octet-stream")
    request.send_header("Content-Length", str(end - start))
    request.send_header("Accept-Ranges", "bytes")
    request.send_header("ETag", etag)
    if partial:
        request.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
    request.end_headers()
    if request.command == "HEAD":
        return
    request.connection.settimeout(STALL_S)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        while start < end:
            sent = request.connection.sendfile(file, start, min(PART_BYTES, end - start))
            if not sent:
                raise ConnectionError("the file is shorter than it was")
            start += sent
