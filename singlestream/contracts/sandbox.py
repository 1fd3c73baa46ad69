"""Messages of the sandbox gateway's ``POST /v1/execute``, as JSON.

Example:
    >>> request = ExecuteRequest(code="6 * 7", echo_last_expr=True, timeout_s=5.0)
    >>> ExecuteRequest.model_validate_json(request.model_dump_json()) == request
    True
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

MAX_CODE_BYTES = 256 << 10
"""Longest code, in bytes of UTF-8; longer is refused with 413."""
MAX_STDIN_BYTES = 1 << 20
"""Longest standard input, in bytes of UTF-8; longer is refused with 413."""
MAX_CPU_S = 600.0
"""Most CPU time that a request may ask for."""
MAX_MEMORY_MB = 4096
"""Most memory that a request may ask for, in MiB."""

RunStatus = Literal["ok", "error", "timeout", "memory_limit", "output_limit", "killed"]
"""How a snippet ended.

``ok``: exit code 0. ``error``: any other exit code, mostly an uncaught exception. ``timeout``: wall or CPU time was
used up. ``memory_limit``: an uncaught MemoryError. ``output_limit``: a stream passed 8 MiB. ``killed``: a signal, such
as a segmentation fault, ended it."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ExecuteRequest(_Message):
    """A snippet to run."""

    code: str
    """The program, at most 256 KiB of UTF-8. It is run exactly as given, as ``main.py``."""
    stdin: str = ""
    """Standard input, at most 1 MiB of UTF-8. Empty means end of file at once."""
    timeout_s: float = Field(default=10.0, gt=0.0, le=60.0)
    """Wall time of the run in seconds, (0, 60]; waiting in the queue does not count."""
    cpu_s: float = Field(default=10.0, gt=0.0, le=MAX_CPU_S)
    """CPU time of all threads together in seconds, (0, 600]; the kernel ends the run two seconds later."""
    memory_mb: int | None = Field(default=None, ge=64, le=MAX_MEMORY_MB)
    """Memory in MiB that the snippet may map beyond the warm interpreter, 64–4096.

    None means the gateway's setting, 1024 by default.
    """
    max_output_bytes: int = Field(default=65_536, ge=0, le=8 << 20)
    """Bytes kept of each stream, 0–8 MiB: the head and the tail; what lies between is counted and dropped."""
    echo_last_expr: bool = False
    """If true, the value of a last expression is shown as the interactive interpreter shows it (``repr``, nothing for
    None).
    """
    seed: int | None = Field(default=None, ge=0, lt=1 << 32)
    """Seed of ``random``, numpy's global generator and sympy's, [0, 2³²). None takes a fresh one."""
    request_id: str | None = Field(default=None, max_length=200)
    """Name of the request in logs and error bodies. None: the gateway makes one up."""


class ErrorReport(_Message):
    """Why a snippet failed, by its own account (a hostile snippet may write here what it likes)."""

    type: str
    """Class name of the uncaught exception, for example ``ZeroDivisionError``."""
    message: str
    """The exception's text, at most 300 characters."""
    line: int | None = None
    """Line of the snippet that raised it, from 1. None if none is known."""


class Usage(_Message):
    """What a run used."""

    wall_s: float = Field(ge=0.0)
    """Seconds from the start of its process to its end."""
    cpu_s: float = Field(ge=0.0)
    """User and system seconds of all its threads."""
    max_rss_mb: float = Field(ge=0.0)
    """Peak resident memory in MiB, the pages that it shares with the warm interpreter included."""
    queue_s: float = Field(ge=0.0)
    """Seconds that the request waited for a slot."""


_RESULT_EXAMPLE: JsonDict = {
    "status": "error",
    "exit_code": 1,
    "signal": None,
    "stdout": "before\n",
    "stderr": 'Traceback (most recent call last):\n  File "main.py", line 2, in <module>\n'
    "ZeroDivisionError: division by zero\n",
    "stdout_truncated": False,
    "stderr_truncated": False,
    "stdout_bytes": 7,
    "stderr_bytes": 109,
    "error": {"type": "ZeroDivisionError", "message": "division by zero", "line": 2},
    "usage": {"wall_s": 0.004, "cpu_s": 0.003, "max_rss_mb": 18.1, "queue_s": 0.0},
    "policy_version": "0123456789ab",
}


class ExecuteResult(_Message):
    """Outcome of a snippet. A fault of the sandbox is never one of these: it is an error response."""

    model_config = ConfigDict(json_schema_extra={"examples": [_RESULT_EXAMPLE]})

    status: RunStatus
    """How it ended."""
    exit_code: int | None
    """Exit code, 0–255. None if a signal ended it."""
    signal: int | None
    """Number of the signal that ended it: 9 at the wall time, 24 at the CPU time. None if it exited."""
    stdout: str
    """Standard output; invalid UTF-8 becomes U+FFFD. What was written before a kill is there."""
    stderr: str
    """Standard error, likewise; tracebacks are here."""
    stdout_truncated: bool
    """Whether part of standard output was left out; a line in the text says how much."""
    stderr_truncated: bool
    """Whether part of standard error was left out."""
    stdout_bytes: int = Field(ge=0)
    """Bytes written to standard output, kept or not."""
    stderr_bytes: int = Field(ge=0)
    """Bytes written to standard error, kept or not."""
    error: ErrorReport | None
    """The uncaught exception. None if there was none, or the run was killed."""
    usage: Usage
    """What it used."""
    policy_version: str
    """Version of the isolation and of the runner: twelve hex digits. Equal versions run alike."""
